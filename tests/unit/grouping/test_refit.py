"""Fits of a branch's input against direct least squares in float64, and folding against applying the map."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_spd.grouping.formulas import BlockFormulas
from megatron_spd.grouping.refit import RIDGE, InputFit, InputMoments
from megatron_spd.runtime.distributed import Runtime
from tests.calibration_cases import base_of, settings_of
from tests.reference import Shape, random_block

BRANCHES, HIDDEN, TOKENS = 3, 6, 400


def inputs(seed: int = 0) -> tuple[Tensor, Tensor]:
    """z [n, h] and z_g [G, n, h] that tell a part of it, float64, with means and scales of their own."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    branch = draw(BRANCHES, TOKENS, HIDDEN) * (0.5 + draw(HIDDEN).abs()) + draw(BRANCHES, 1, HIDDEN)
    mixed = branch.mean(0) @ (torch.eye(HIDDEN) + 0.3 * draw(HIDDEN, HIDDEN))
    return mixed + 0.5 * draw(TOKENS, HIDDEN) + draw(HIDDEN), branch


def moments_of(dense: Tensor, branch: Tensor, runtime: Runtime, size: int = 90) -> InputMoments:
    moments = InputMoments(len(branch), dense.shape[1], torch.device("cpu"))
    for rows in torch.arange(len(dense)).split(size):
        moments.add(dense[rows], branch[:, rows])
    moments.reduce(runtime)
    return moments


def mapped(fit: InputFit, branch: Tensor) -> Tensor:
    """What the fit makes of z_g: T_g (w_g z_g + b_g)."""
    assert fit.norm_weight is not None
    assert fit.norm_bias is not None
    read = branch * fit.norm_weight[:, None].double() + fit.norm_bias[:, None].double()
    return read if fit.transform is None else read @ fit.transform.double().transpose(1, 2)


def test_norm_fit_is_least_squares_channel_by_channel(runtime: Runtime) -> None:
    dense, branch = inputs()
    shift = torch.ones(BRANCHES, HIDDEN)
    fit = moments_of(dense, branch, runtime).norm_fit(shift)
    assert (fit.name, fit.transform) == ("norm", None)
    assert fit.shift is shift
    assert fit.norm_weight is not None
    assert fit.norm_bias is not None
    for g in range(BRANCHES):
        for channel in range(HIDDEN):
            columns = np.stack([branch[g, :, channel], np.ones(TOKENS)], 1)
            weight, bias = np.linalg.lstsq(columns, dense[:, channel].numpy(), rcond=None)[0]
            assert float(fit.norm_weight[g, channel]) == pytest.approx(weight, rel=1e-4, abs=1e-5)
            assert float(fit.norm_bias[g, channel]) == pytest.approx(bias, rel=1e-4, abs=1e-5)


def test_full_fit_without_ridge_is_least_squares(runtime: Runtime) -> None:
    dense, branch = inputs()
    fit = moments_of(dense, branch, runtime).full_fit(None, ridge=1e-12)
    for g, got in enumerate(mapped(fit, branch)):
        columns = np.concatenate([branch[g], np.ones((TOKENS, 1))], 1)
        solution = np.linalg.lstsq(columns, dense.numpy(), rcond=None)[0]
        np.testing.assert_allclose(got, columns @ solution, rtol=1e-4, atol=1e-5)
        assert fit.transform is not None
        np.testing.assert_allclose(fit.transform[g], solution[:-1].T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ridge", [RIDGE, 10.0])
def test_full_fit_is_ridge_regression_towards_the_identity(runtime: Runtime, ridge: float) -> None:
    """Least squares on rows that ask for T - I = 0 beside those of the tokens."""
    dense, branch = inputs()
    fit = moments_of(dense, branch, runtime).full_fit(None, ridge)
    assert fit.name == "refit"
    for g in range(BRANCHES):
        own, missing = branch[g] - branch[g].mean(0), (dense - branch[g]) - (dense - branch[g]).mean(0)
        damping = ridge * own.square().mean()
        rows = torch.cat([own, (TOKENS * damping).sqrt() * torch.eye(HIDDEN)])
        wanted = torch.cat([missing, torch.zeros(HIDDEN, HIDDEN)])
        gain = np.linalg.lstsq(rows.numpy(), wanted.numpy(), rcond=None)[0].T
        assert fit.transform is not None
        np.testing.assert_allclose(fit.transform[g], np.eye(HIDDEN) + gain, rtol=1e-5, atol=1e-6)


def test_much_ridge_leaves_the_mean_alone_to_be_fitted(runtime: Runtime) -> None:
    dense, branch = inputs()
    fit = moments_of(dense, branch, runtime).full_fit(None, ridge=1e9)
    torch.testing.assert_close(fit.transform, torch.eye(HIDDEN).expand(BRANCHES, HIDDEN, HIDDEN))
    torch.testing.assert_close(fit.norm_bias, (dense - branch).mean(1).float())


@pytest.mark.parametrize("kind", ["norm", "refit"])
def test_means_agree_after_the_fit(runtime: Runtime, kind: str) -> None:
    dense, branch = inputs()
    moments = moments_of(dense, branch, runtime)
    fit = moments.norm_fit(None) if kind == "norm" else moments.full_fit(None)
    means = mapped(fit, branch).mean(1)
    torch.testing.assert_close(means, dense.mean(0).expand_as(means), rtol=1e-5, atol=1e-5)
    assert (mapped(fit, branch) - dense).square().sum() < (branch - dense).square().sum()


@pytest.mark.parametrize("kind", ["norm", "refit"])
def test_nothing_missing_nothing_changed(runtime: Runtime, kind: str) -> None:
    dense, _ = inputs()
    moments = moments_of(dense, dense.expand(BRANCHES, -1, -1), runtime)
    fit = moments.norm_fit(None) if kind == "norm" else moments.full_fit(None)
    torch.testing.assert_close(fit.norm_weight, torch.ones(BRANCHES, HIDDEN))
    torch.testing.assert_close(fit.norm_bias, torch.zeros(BRANCHES, HIDDEN), rtol=0, atol=1e-6)
    if kind == "refit":
        torch.testing.assert_close(fit.transform, torch.eye(HIDDEN).expand(BRANCHES, HIDDEN, HIDDEN))


@pytest.mark.parametrize("size", [1, 33, TOKENS])
def test_streaming_in_any_pieces_is_the_same(runtime: Runtime, size: int) -> None:
    wanted = moments_of(*inputs(), runtime).full_fit(None)
    fit = moments_of(*inputs(), runtime, size).full_fit(None)
    torch.testing.assert_close(fit.transform, wanted.transform, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(fit.norm_bias, wanted.norm_bias, rtol=1e-6, atol=1e-6)


def test_a_channel_that_never_moves(runtime: Runtime) -> None:
    """A dead channel has no variance; its bias alone says what it is."""
    dense, branch = inputs()
    dense[:, 2], branch[:, :, 2] = 4.0, 1.0
    moments = moments_of(dense, branch, runtime)
    for fit in (moments.norm_fit(None), moments.full_fit(None)):
        torch.testing.assert_close(
            mapped(fit, branch)[..., 2], torch.full((BRANCHES, TOKENS), 4.0).double(), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("biases", [True, False])
def test_folding_is_applying_the_map(runtime: Runtime, biases: bool, gated: bool) -> None:
    shape = Shape(hidden=HIDDEN, heads=6, kv_groups=3, head_dim=2, ffn=12, gated=gated)
    weights = random_block(shape, 1, torch.Generator().manual_seed(5), biases)
    dense, branch = inputs()
    fit = moments_of(dense, branch, runtime).full_fit(None)
    assert fit.norm_bias is not None
    assert fit.transform is not None
    read = (branch + fit.norm_bias[:, None].double())[:, :, None]
    moved = read @ fit.transform.double().transpose(1, 2)[:, None]
    readers = {
        "attention": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
        "mlp": ("mlp.gate_proj.weight", "mlp.up_proj.weight") if gated else ("mlp.up_proj.weight",),
    }
    for sublayer, names in readers.items():
        folded = fit.folded(weights, names)
        assert {n for n in folded if folded[n] is not weights[n]} == set(names)
        plain, own = (
            BlockFormulas(w, base_of(shape), settings_of(shape), BRANCHES) for w in (weights, folded)
        )
        torch.testing.assert_close(own.partial(sublayer, read), plain.partial(sublayer, moved))


def test_a_fit_without_a_map_folds_nothing() -> None:
    weights = {"w": torch.ones(6, 2)}
    assert InputFit("shift", torch.ones(3, 2)).folded(weights, ("w",))["w"] is weights["w"]
