"""One suite for every family: each format against the plain float64 formula and against transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from megatron_spd.calibration.stream import model_shape
from megatron_spd.checkpoint.hf import CheckpointReader
from megatron_spd.compensation import make_calibrator
from megatron_spd.distill.gather import full_block
from megatron_spd.evaluate.generate import load_for_generation
from megatron_spd.grouping.calibrate import Ingredients
from megatron_spd.grouping.formulas import AttentionSettings, BlockFormulas
from megatron_spd.grouping.permute import permute_block
from megatron_spd.grouping.sample import Sample
from megatron_spd.latency.model import CachedModel, load_model
from megatron_spd.models.build import build_gpt_model, causal_mask
from megatron_spd.plan import SPDPlan
from megatron_spd.runtime.distributed import Runtime, initialize
from megatron_spd.stages import make_streamer
from tests.families import (
    CONFIGS,
    COVERED,
    EXPERTS,
    LAYERS,
    Formula,
    make_model,
    probe,
    shape_of,
    stored_tensor,
    token_ids,
)
from tests.models import make_export
from tests.ranks import run_ranks
from tests.reference import attention_branch, mlp_branch, norm

#: Every kind of segment: attention dropped, a run through an MLP point, an MLP point alone; the last block ends plain.
DROPPED = [0, 2, 3, 5]
EXTRAS: dict[str, Any] = {"shifts": [(0, "mlp")], "norms": [(1, "mlp"), (2, "attention")]}
#: Rotary angles are float32 in Megatron-core and transformers, and so are norms in transformers.
MEGATRON_BOUND, TRANSFORMERS_BOUND = 2e-6, 1e-5


class Folders:
    """Models and exports of all cases, made when they are asked for."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def plain(self, case: str) -> Path:
        folder = self._root / case
        return folder if folder.exists() else make_model(case, folder)

    def export(self, case: str, branches: int) -> Path:
        folder = self._root / f"{case} {branches}"
        return (
            folder if folder.exists() else make_export(self.plain(case), folder, branches, DROPPED, **EXTRAS)
        )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(tmp_path_factory.mktemp("families"))


def assert_close(got: dict[str, Tensor], wanted: dict[str, Tensor], bound: float) -> None:
    assert got.keys() == wanted.keys()
    # Without rotary embeddings the gradient of k_proj's bias is zero: the softmax does not see a constant.
    floor = 1e-6 * max(float(t.norm()) for t in wanted.values())
    errors = {name: relative_error(got[name], wanted[name], floor) for name in wanted}
    bad = {name: error for name, error in errors.items() if not error < bound}
    assert not bad, bad


def relative_error(got: Tensor, wanted: Tensor, floor: float = 1e-12) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(floor))


def wanted(case: str, folder: Path) -> dict[str, Tensor]:
    """Logits and gradients by the formula."""
    formula = Formula(case, folder)
    gradients = formula.gradients(token_ids(), probe())
    return {"logits": formula.logits(token_ids()).detach(), **gradients}


# ---- transformers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", COVERED)
def test_transformers_model_is_the_formula(folders: Folders, case: str) -> None:
    folder = folders.export(case, 2)
    model = load_for_generation(folder, torch.float64)
    logits = model(token_ids()).logits
    (logits * probe()).sum().backward()
    family = CheckpointReader(folder).family
    expected = wanted(case, folder)
    got = {"logits": logits.detach()}
    for name in expected.keys() - {"logits"}:
        block, _, relative = name.partition(".")
        got[name] = stored_tensor(model, family, int(block), relative)[1]
    assert_close(got, expected, TRANSFORMERS_BOUND)
    # Dropping matters on this model, so that equal logits say something.
    dense = AutoModelForCausalLM.from_pretrained(folders.plain(case)).eval()(token_ids()).logits
    assert relative_error(dense, logits) > 0.1


@pytest.mark.parametrize("case", CONFIGS)
def test_the_exported_code_is_the_packages_own(folders: Folders, case: str) -> None:
    folder = folders.export(case, 2)
    own = load_for_generation(folder)
    shipped = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    assert type(shipped).__name__ == type(own).__name__
    assert type(shipped).__module__.startswith("transformers_modules")
    assert torch.equal(shipped(token_ids()).logits, own(token_ids()).logits)


@pytest.mark.parametrize("case", CONFIGS)
def test_with_one_branch_an_export_is_the_dense_model(folders: Folders, case: str, tmp_path: Path) -> None:
    folder = make_export(folders.plain(case), tmp_path / "x", 1, DROPPED)
    dense = AutoModelForCausalLM.from_pretrained(folders.plain(case)).eval()(token_ids(40)).logits
    assert relative_error(load_for_generation(folder)(token_ids(40)).logits, dense) < TRANSFORMERS_BOUND


@pytest.mark.parametrize("case", CONFIGS)
def test_cached_decoding_equals_full_recompute(folders: Folders, case: str) -> None:
    model, ids = load_for_generation(folders.export(case, 2), torch.float64), token_ids(12)
    out = model(ids[:, :5], use_cache=True)
    steps = [out.logits]
    for t in range(5, 12):
        out = model(ids[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
        steps.append(out.logits)
    assert relative_error(torch.cat(steps, 1), model(ids, use_cache=False).logits) < TRANSFORMERS_BOUND


# ---- Megatron-core --------------------------------------------------------------------------------------------------


def megatron_result(folder: Path, ranks: int) -> dict[str, Tensor]:
    """What :func:`wanted` gives, by GPTModel on ``ranks`` ranks in float64; replicated gradients are the same on all
    (asserted)."""
    runtime, reader = initialize(ranks), CheckpointReader(folder)
    shape, ids = model_shape(reader), token_ids()
    assert reader.plan is not None
    model = build_gpt_model(shape, reader.plan, reader.block, reader.get, runtime, torch.float64)
    logits = full_logits(model, ids)
    (logits * probe()).sum().backward()
    result = {"logits": logits.detach()}
    for i, layer in enumerate(model.decoder.layers):
        for name, parameter in layer.named_parameters():
            gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
            if not getattr(parameter, "tensor_model_parallel", False):
                assert_same_on_all_ranks(f"{i}.{name}", gradient, runtime)
            parameter.data = gradient
        full = full_block(layer, reader.block_names(i), shape, reader.plan.branches, runtime)
        result |= {f"{i}.{name}": tensor for name, tensor in full.items()}
    return result


def full_logits(model: Any, ids: Tensor) -> Tensor:
    """Logits [b, s, vocabulary] of a GPTModel."""
    length = ids.shape[1]
    positions = torch.arange(length).expand_as(ids)
    return model(ids, positions, causal_mask(length, ids.device), runtime_gather_output=True)


def assert_same_on_all_ranks(name: str, tensor: Tensor, runtime: Runtime) -> None:
    first = tensor.clone()
    dist.broadcast(first, dist.get_global_rank(runtime.tp_group, 0), runtime.tp_group)
    # Replicas that differ drift apart under an optimizer.
    assert torch.equal(first, tensor), f"{name} differs between rank 0 and {runtime.tp_rank}"


@pytest.mark.parametrize("case", COVERED)
@pytest.mark.parametrize(("branches", "ranks"), [(4, 1), (2, 2), (4, 2)])
def test_megatron_model_is_the_formula(folders: Folders, case: str, branches: int, ranks: int) -> None:
    folder = folders.export(case, branches)
    got = run_ranks(ranks, megatron_result, folder, ranks)[0]
    assert_close(got, wanted(case, folder), MEGATRON_BOUND)


def megatron_logits(folder: Path, ranks: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Logits of the plain or exported model in ``folder``, every block's core attention the stock one."""
    runtime, reader = initialize(ranks), CheckpointReader(folder)
    plan = reader.plan or SPDPlan.dense(reader.base_model(), ranks)
    model = build_gpt_model(model_shape(reader), plan, reader.block, reader.get, runtime, dtype).eval()
    with torch.no_grad():
        return full_logits(model, token_ids(40))


@pytest.mark.parametrize("case", CONFIGS)
@pytest.mark.parametrize("ranks", [1, 2])
def test_logits_are_those_of_transformers(folders: Folders, case: str, ranks: int) -> None:
    for folder in folders.plain(case), folders.export(case, 2):
        expected = load_for_generation(folder)(token_ids(40)).logits
        got = run_ranks(ranks, megatron_logits, folder, ranks)[0]
        assert relative_error(got, expected) < 1e-5


@pytest.mark.parametrize("case", ["opt", "qwen3", "mistral with a window"])
def test_bf16_error_is_at_most_twice_that_of_transformers(folders: Folders, case: str) -> None:
    folder = folders.export(case, 2)
    exact = load_for_generation(folder, torch.float64)(token_ids(40)).logits
    allowed = 2 * relative_error(load_for_generation(folder, torch.bfloat16)(token_ids(40)).logits, exact)
    got = run_ranks(2, megatron_logits, folder, 2, torch.bfloat16)[0]
    assert got.dtype == torch.bfloat16
    assert relative_error(got, exact) <= allowed


def greedy(folder: Path, prompts: Tensor, count: int) -> Tensor:
    """``count`` tokens behind ``prompts`` by the model with a KV cache on two ranks."""
    runtime, reader = initialize(2), CheckpointReader(folder)
    assert reader.plan is not None
    model = load_model(reader, reader.plan, runtime, torch.float32)
    cached = CachedModel(model, reader.config["vocab_size"], len(prompts), prompts.shape[1] + count)
    chosen = [cached.prefill(prompts)]
    while len(chosen) < count:
        chosen.append(cached.decode(chosen[-1]))
    return torch.stack(chosen, 1)


def recomputed(model: PreTrainedModel, ids: Tensor, count: int) -> Tensor:
    start = ids.shape[1]
    for _ in range(count):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids[:, start:]


@pytest.mark.parametrize("case", CONFIGS)
def test_megatron_decodes_with_a_cache_as_transformers_recomputes(folders: Folders, case: str) -> None:
    folder, prompts = folders.export(case, 4), token_ids(7)
    expected = recomputed(load_for_generation(folder), prompts, 6)
    assert torch.equal(run_ranks(2, greedy, folder, prompts, 6)[0], expected)


# ---- streams and calibration ----------------------------------------------------------------------------------------


def streamed_nll(folder: Path) -> Tensor:
    """Sum of -log p of every sequence, by a stream through single blocks."""
    streamer = make_streamer(CheckpointReader(folder), initialize(1))
    stream = streamer.embed(token_ids(40))
    for block in range(LAYERS):
        stream = streamer.advance(block, stream)
    return streamer.sequence_nll(stream, token_ids(40))


@pytest.mark.parametrize("case", CONFIGS)
def test_streamed_likelihood_is_that_of_transformers(folders: Folders, case: str) -> None:
    folder, ids = folders.plain(case), token_ids(40)
    logits = AutoModelForCausalLM.from_pretrained(folder).eval()(ids).logits.double().log_softmax(-1)
    expected = -logits[:, :-1].gather(-1, ids[:, 1:, None])[..., 0].sum(1)
    assert relative_error(run_ranks(1, streamed_nll, folder)[0], expected) < 1e-5


@pytest.mark.parametrize("case", [case for case in COVERED if case not in EXPERTS])
def test_calibrations_view_of_a_block_is_the_formula(folders: Folders, case: str) -> None:
    reader, shape = CheckpointReader(folders.plain(case)), shape_of(case)
    weights = {name: t.double() for name, t in reader.block(1).items()}
    block = BlockFormulas(weights, reader.base_model(), AttentionSettings.of(model_shape(reader)), 4)
    x = torch.randn(11, 2, shape.hidden, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for sublayer, name, branch in (
        ("attention", "input_layernorm", attention_branch),
        ("mlp", "post_attention_layernorm", mlp_branch),
    ):
        z = norm(x, weights, name, shape)
        expected = torch.stack([branch(z, weights, shape, g, 4) for g in range(4)])
        assert (
            relative_error(block.partial(sublayer, block.normed(x, sublayer)[None]), expected)
            < MEGATRON_BOUND
        )
    maps = torch.cat(list(block.attention_maps(block.normed(x, "attention")[None])), 2)
    seen = shape.window or len(x)
    assert torch.equal((maps > 0).sum(-1)[0, 0], torch.arange(1, len(x) + 1).clamp(max=seen))


@pytest.mark.parametrize("case", CONFIGS)
def test_orders_change_nothing_in_a_dense_model(folders: Folders, case: str, tmp_path: Path) -> None:
    folder = folders.plain(case)
    reader = CheckpointReader(folder)
    base = reader.base_model()
    orders = [torch.randperm(n).tolist() for n in (base.num_key_value_heads, base.intermediate_size)]
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    before = model(token_ids()).logits
    for i in range(LAYERS):
        moved = permute_block(reader.block(i), reader.family, base, reader.head_dim, *orders)
        assert any(not torch.equal(moved[n], t) for n, t in reader.block(i).items())
        for name, tensor in moved.items():
            stored_tensor(model, reader.family, i, name)[0].data.copy_(tensor)
    assert relative_error(model(token_ids()).logits, before) < TRANSFORMERS_BOUND


def calibrated_errors(folder: Path) -> dict[str, float]:
    """Squared errors of block 1's output with its attention point dropped in two branches: ``zero-shot`` and
    ``calibrated``."""
    streamer = make_streamer(CheckpointReader(folder), initialize(1))
    fit, judge = (streamer.advance(0, streamer.embed(token_ids(60, seed))) for seed in (0, 1))
    plain = SPDPlan.dense(streamer.reader.base_model(), 2).with_drops([2])
    ingredients = Ingredients(heads="joint", neurons=True, shift=True, norm=True, refit=True)
    calibrator = make_calibrator(streamer, 2, ingredients)
    result = calibrator.calibrate(range(1, 2), [plain.block_schedule(1)], Sample.of(fit, judge))[1]
    after = plain.with_block(1, **result.changes)

    def error(plan: SPDPlan, own: Any) -> float:
        found, _ = streamer.advance_pending(1, plan.block_schedule(1), judge, [None] * len(judge), own)
        pairs = zip(found, streamer.advance(1, judge), strict=True)
        return float(sum((a - b)[1:].square().sum() for a, b in pairs))

    return {"zero-shot": error(plain, None), "calibrated": error(after, result.weights)}


@pytest.mark.parametrize("case", ["mistral with a window", "qwen3 with biases", "opt"])
def test_calibration_lowers_the_error_of_a_block(folders: Folders, case: str) -> None:
    (errors,) = run_ranks(1, calibrated_errors, folders.plain(case))
    assert 0 < errors["calibrated"] < 0.9 * errors["zero-shot"]
