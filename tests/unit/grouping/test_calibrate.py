"""Calibration of units on random blocks: what it may change, what it must not, and that the guard tells the truth."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_spd.errors import UserError
from megatron_spd.grouping.assignment import assign_neurons
from megatron_spd.grouping.calibrate import BlockResult, UnitCalibrator
from megatron_spd.grouping.formulas import BlockFormulas
from megatron_spd.grouping.neurons import ReadingCost
from megatron_spd.grouping.permute import permute_block
from megatron_spd.grouping.refit import InputMoments
from megatron_spd.grouping.sample import Sample
from megatron_spd.models.build import BlockUnit, ModelShape
from megatron_spd.models.llama import LLAMA
from megatron_spd.plan import SPDPlan
from megatron_spd.runtime.distributed import Runtime
from tests.calibration_cases import (
    base_of,
    hidden_states,
    make_calibrator,
    output_error,
    random_blocks,
    schedules_of,
    settings_of,
)
from tests.reference import Shape, blocks_forward

SHAPE = Shape(hidden=24, heads=6, kv_groups=6, head_dim=4, ffn=48)
GQA = Shape(hidden=24, heads=12, kv_groups=6, head_dim=4, ffn=36)
BRANCHES = 3
ALL: dict[str, Any] = {"heads": "joint", "neurons": True, "shift": True, "norm": True, "refit": True}
#: Dropped points and the blocks of their unit: an SPD block, a dropped MLP point alone, both, and a run of all.
DROPS = {"attention": (1, (0,)), "mlp": (2, (1,)), "both": (2, (0, 1)), "run": (3, (0, 1, 2, 3, 4))}


def calibrated(
    blocks: Sequence[dict[str, Tensor]],
    runtime: Runtime,
    dropped: Sequence[int],
    shape: Shape = SHAPE,
    sample: Sample | None = None,
    **ingredients: Any,
) -> tuple[dict[int, BlockResult], SPDPlan]:
    """Results, and the plan with their changes."""
    plan, unit = schedules_of(shape, len(blocks), BRANCHES, dropped)
    calibrator = make_calibrator(blocks, shape, BRANCHES, runtime, **ingredients)
    sample = sample or Sample.of(hidden_states(shape, 12, 1), hidden_states(shape, 4, 2))
    results = calibrator.calibrate(unit, [plan.block_schedule(i) for i in unit], sample)
    for block, result in results.items():
        plan = plan.with_block(block, **result.changes)
    plan.validate()
    return results, plan


def megatron_output(
    results: dict[int, BlockResult], plan: SPDPlan, shape: Shape, x: Tensor, runtime: Runtime
) -> Tensor:
    """What the layers make of the results, with what ``x`` [s, b, h] stands in front of."""
    config = {
        "num_hidden_layers": plan.num_layers,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_groups,
        "rms_norm_eps": shape.eps,
        "rope_theta": shape.rope_theta,
        "attention_bias": True,
        "mlp_bias": True,
        "max_position_embeddings": 64,
    }
    schedules = [plan.block_schedule(i) for i in results]
    unit = BlockUnit(ModelShape(LLAMA, config, shape.head_dim), schedules, runtime, torch.float32).eval()
    for index, result in enumerate(results.values()):
        unit.load_block(index, result.weights)
    with torch.no_grad():
        return unit(x)


def relative_error(got: Tensor, dense: Tensor, before: Tensor) -> float:
    """Energy of ``got - dense`` relative to the dense sublayer's own output, first positions left out."""
    return float((got - dense)[1:].square().sum() / (dense - before)[1:].square().sum())


# ---- orders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [SHAPE, GQA], ids=["mha", "gqa"])
@pytest.mark.parametrize(
    ("ingredients", "share"),
    [({"neurons": True}, 0.97), ({"heads": "published"}, 1.0), ({"heads": "joint", "neurons": True}, 0.97)],
)
def test_orders_leave_the_dense_block_alone_and_help_without_its_sync(
    runtime: Runtime, shape: Shape, ingredients: dict[str, Any], share: float
) -> None:
    """On sequences that were neither fitted on nor judged by; heads alone may find nothing better."""
    blocks = random_blocks(shape, 1)
    results, _ = calibrated(blocks, runtime, (0,), shape, **ingredients)
    own = [{n: t.double() for n, t in results[0].weights.items()}]
    assert set(results[0].changes) <= {"kv_group_order", "neuron_order"}
    for x in hidden_states(shape, 2, 3):
        dense = blocks_forward(x.double(), blocks, shape, 1, ())
        torch.testing.assert_close(blocks_forward(x.double(), own, shape, 1, ()), dense, rtol=0, atol=1e-11)
    unseen = hidden_states(shape, 20, 4)
    after = output_error(unseen, own, blocks, shape, BRANCHES, (0,))
    before = output_error(unseen, blocks, blocks, shape, BRANCHES, (0,))
    assert after <= share * before


@pytest.mark.parametrize("name", DROPS)
def test_everything_together_helps_on_unseen_sequences(runtime: Runtime, name: str) -> None:
    layers, dropped = DROPS[name]
    blocks = random_blocks(SHAPE, layers)
    results, _ = calibrated(blocks, runtime, dropped, **ALL)
    assert list(results) == list(range(layers))
    unseen = hidden_states(SHAPE, 20, 4)
    after = output_error(unseen, [r.weights for r in results.values()], blocks, SHAPE, BRANCHES, dropped)
    before = output_error(unseen, blocks, blocks, SHAPE, BRANCHES, dropped)
    assert after < 0.9 * before


@pytest.mark.parametrize("shape", [SHAPE, GQA], ids=["mha", "gqa"])
@pytest.mark.parametrize("name", DROPS)
def test_the_plan_reproduces_the_weights(runtime: Runtime, name: str, shape: Shape) -> None:
    """Byte for byte: the orders give everything but branch tensors, and the projections that a re-fit folds into."""
    layers, dropped = DROPS[name]
    blocks = random_blocks(shape, layers)
    results, plan = calibrated(blocks, runtime, dropped, shape, **ALL)
    for i, result in results.items():
        block = plan.blocks[i]
        base = {n: t.float() for n, t in blocks[i].items()}
        wanted = permute_block(
            base, LLAMA, base_of(shape), shape.head_dim, block.kv_group_order, block.neuron_order
        )
        folded = set()
        if result.kept.get("attention", "").startswith("refit"):
            folded |= {f"self_attn.{p}_proj.weight" for p in "qkv"}
        if result.kept.get("mlp", "").startswith("refit"):
            folded |= {"mlp.gate_proj.weight", "mlp.up_proj.weight"}
        planned = {entry.source for entry in LLAMA.planned_branch_tensors(block)}
        assert set(result.weights) == set(wanted) | planned
        for tensor in planned:
            assert result.weights[tensor].shape == (BRANCHES, shape.hidden)
        for tensor, value in wanted.items():
            assert torch.equal(result.weights[tensor], value) == (tensor not in folded), tensor


@pytest.mark.parametrize("ingredient", ["none", "shift", "norm", "refit"])
def test_neurons_go_where_they_lose_least_with_what_was_fitted(runtime: Runtime, ingredient: str) -> None:
    """The cost of a neuron in a branch is that of reading as the kept fit reads, folded map included."""
    blocks, sequences = random_blocks(SHAPE, 1), hidden_states(SHAPE, 12, 1)
    chosen = {} if ingredient == "none" else {ingredient: True}
    results, _ = calibrated(blocks, runtime, (0,), neurons=True, **chosen)
    assert results[0].kept["mlp"] == f"{ingredient} + neurons"
    base = base_of(SHAPE)
    block = BlockFormulas({n: t.float() for n, t in blocks[0].items()}, base, settings_of(SHAPE), BRANCHES)
    x = torch.cat(sequences, 1)
    parts = block.attention(block.normed(x, "attention")[None])
    bias = block.weights["self_attn.o_proj.bias"]
    u, own = (x + parts.sum(0) + bias)[1:].flatten(0, 1), (x + parts + bias)[:, 1:].flatten(1, 2)
    z, read = block.normed(u, "mlp"), block.normed(own, "mlp")
    if ingredient == "shift":
        read = block.normed(own + (u - own).mean(1, keepdim=True), "mlp")
    moments = InputMoments(BRANCHES, SHAPE.hidden, torch.device("cpu"))
    moments.add(z, read)
    if ingredient == "norm":
        fit = moments.norm_fit(None)
        read = read * fit.norm_weight[:, None] + fit.norm_bias[:, None]
    elif ingredient == "refit":
        fit = moments.full_fit(None)
        read = (read + fit.norm_bias[:, None]) @ fit.transform.transpose(1, 2)
    cost = ReadingCost(block, BRANCHES)
    cost.add(z, read)
    wanted = assign_neurons(cost.cost(runtime).numpy())
    order = results[0].changes["neuron_order"]
    if order != wanted.order():  # two places may cost the same to rounding
        branch = torch.empty(SHAPE.ffn, dtype=torch.long)
        branch[order] = torch.arange(SHAPE.ffn) // (SHAPE.ffn // BRANCHES)
        assert float(cost.cost(runtime).gather(1, branch[:, None]).sum()) == pytest.approx(
            wanted.cost, rel=1e-6
        )


# ---- the guard ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ingredients", [{"shift": True}, {"norm": True}, {"refit": True}, {"neurons": True}, ALL]
)
def test_recorded_error_is_that_of_the_layers(runtime: Runtime, ingredients: dict[str, Any]) -> None:
    """The SPD block with what was kept, through Megatron-core, against the dense block on the judging sequences."""
    blocks = random_blocks(SHAPE, 1)
    judge = hidden_states(SHAPE, 4, 2)
    sample = Sample.of(hidden_states(SHAPE, 12, 1), judge)
    (result,), plan = _only(calibrated(blocks, runtime, (0,), sample=sample, **ingredients))
    x = torch.cat(judge, 1)
    dense = blocks_forward(x.double(), blocks, SHAPE, 1, ())
    before = blocks_forward(x.double(), [_without_mlp(blocks[0])], SHAPE, 1, ())
    got = megatron_output({0: result}, plan, SHAPE, x, runtime)
    kept = result.errors["mlp"][result.kept["mlp"]]
    assert kept == min(result.errors["mlp"].values())
    assert kept == pytest.approx(relative_error(got, dense, before), rel=1e-4)
    moved = permute_block(
        blocks[0], LLAMA, base_of(SHAPE), SHAPE.head_dim, plan.blocks[0].kv_group_order, None
    )
    plain = blocks_forward(x.double(), [moved], SHAPE, BRANCHES, (0,))
    assert result.errors["mlp"]["none"] == pytest.approx(relative_error(plain, dense, before), rel=1e-4)
    assert kept < 0.97 * result.errors["mlp"]["none"]


def _only(found: tuple[dict[int, BlockResult], SPDPlan]) -> tuple[list[BlockResult], SPDPlan]:
    return list(found[0].values()), found[1]


def _without_mlp(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return weights | {n: torch.zeros_like(t) for n, t in weights.items() if "down_proj" in n}


@pytest.mark.parametrize("name", ["mlp", "both", "run"])
def test_recorded_errors_of_units_of_several_blocks(runtime: Runtime, name: str) -> None:
    """Behind the unit, and behind the attention that reads pending sums as if it were synced there."""
    layers, dropped = DROPS[name]
    blocks = random_blocks(SHAPE, layers)
    judge = hidden_states(SHAPE, 4, 2)
    sample = Sample.of(hidden_states(SHAPE, 12, 1), judge)
    results, plan = calibrated(blocks, runtime, dropped, sample=sample, **ALL)
    x = torch.cat(judge, 1)
    states = [x.double()]  # dense, behind every sublayer
    for weights in blocks:
        states.append(blocks_forward(states[-1], [_without_mlp(weights)], SHAPE, 1, ()))
        states.append(blocks_forward(states[-2], [weights], SHAPE, 1, ()))
    for i in range(1, layers):
        result = results[i]
        assert (
            min(result.errors["attention"].values()) == result.errors["attention"][result.kept["attention"]]
        )
        own = [{n: t.double() for n, t in results[k].weights.items()} for k in range(i + 1)]
        own[-1] = _without_mlp(own[-1])
        synced = [p for p in dropped if p < 2 * i]
        got = blocks_forward(x.double(), own, SHAPE, BRANCHES, synced)
        wanted = relative_error(got, states[2 * i + 1], states[2 * i])
        assert result.errors["attention"][result.kept["attention"]] == pytest.approx(wanted, rel=1e-4)
    last = results[layers - 1]
    if 2 * layers - 2 in dropped:
        got = megatron_output(results, plan, SHAPE, x, runtime)
        wanted = relative_error(got, states[-1], states[-2])
        assert last.errors["mlp"][last.kept["mlp"]] == pytest.approx(wanted, rel=1e-4)
    else:
        assert "mlp" not in last.errors  # a dense MLP that reads a synced sum: nothing to choose


@pytest.mark.parametrize("ingredient", ["shift", "norm", "refit"])
def test_what_harms_held_out_sequences_is_not_kept(runtime: Runtime, ingredient: str) -> None:
    """Fitted on sequences of one kind, judged by another: what was fitted is wrong there, and is recorded as such."""
    blocks = random_blocks(SHAPE, 1)
    fit = [8.0 * x + 20.0 for x in hidden_states(SHAPE, 12, 1)]
    sample = Sample.of(fit, hidden_states(SHAPE, 4, 2))
    results, _ = calibrated(blocks, runtime, (0,), sample=sample, **{ingredient: True})
    result = results[0]
    assert result.errors["mlp"][ingredient] > result.errors["mlp"]["none"]
    assert result.kept["mlp"] == "none"
    assert result.changes == {}
    for name, tensor in blocks[0].items():
        assert torch.equal(result.weights[name], tensor.float())
    # The same ingredient is kept where it helps.
    results, _ = calibrated(blocks, runtime, (0,), **{ingredient: True})
    assert results[0].kept["mlp"] == ingredient


def test_every_candidate_is_in_the_record(runtime: Runtime) -> None:
    results, _ = calibrated(random_blocks(SHAPE, 2), runtime, (0, 1), **ALL)
    fits = ["none", "shift", "norm", "refit"]
    first, second = results[0], results[1]
    for errors in (first.errors["mlp"], second.errors["attention"]):
        assert list(errors)[:4] == fits
    # Neurons are moved for the best way of reading.
    best = min(fits, key=lambda fit: first.errors["mlp"][fit])
    assert list(first.errors["mlp"])[4:] == [f"{best} + neurons"]
    assert list(first.errors["heads"]) == ["original", "published", "joint"]
    assert "attention" not in first.errors
    assert len(second.errors["attention"]) == 4
    for result in results.values():
        assert json.loads(json.dumps(result.record)) == result.record
        for part, name in result.kept.items():
            assert result.errors[part][name] == min(result.errors[part].values())
            assert all(math.isfinite(error) for error in result.errors[part].values())


# ---- heads ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [SHAPE, GQA], ids=["mha", "gqa"])
@pytest.mark.parametrize("seed", range(3))
def test_heads_are_chosen_by_the_error_that_counts(runtime: Runtime, shape: Shape, seed: int) -> None:
    blocks = random_blocks(shape, 1, seed)
    judge = hidden_states(shape, 4, 2)
    sample = Sample.of(hidden_states(shape, 12, 1), judge)
    errors = {}
    for heads in ("none", "published", "joint"):
        results, _ = calibrated(blocks, runtime, (0,), shape, sample, heads=heads, neurons=True)
        result = results[0]
        errors[heads] = result.errors["mlp"][result.kept["mlp"]]
        measured = output_error(judge, [result.weights], blocks, shape, BRANCHES, (0,))
        size = output_error(judge, [_without_mlp(blocks[0])], blocks, shape, 1, ())
        assert errors[heads] == pytest.approx(measured / size, rel=1e-4)
        if heads != "none":
            assert result.errors["heads"]["original"] == errors["none"]
            assert errors[heads] == result.errors["heads"][result.kept["heads"]]
            assert errors[heads] == min(result.errors["heads"].values())
    assert errors["joint"] <= errors["published"] <= errors["none"]


def test_heads_alone_are_judged(runtime: Runtime) -> None:
    """With nothing else to choose, the published order still competes by its error."""
    kept = set()
    for seed in range(4):
        blocks = random_blocks(SHAPE, 1, seed)
        results, _ = calibrated(blocks, runtime, (0,), heads="published")
        errors = results[0].errors["heads"]
        assert min(errors.values()) > 0
        assert errors[results[0].kept["heads"]] == min(errors.values())
        kept.add(results[0].kept["heads"])
    assert kept == {"original", "published"}


def test_heads_stay_where_neurons_have_found_them(runtime: Runtime) -> None:
    """Not in a block that reads a pending sum, and not where every branch has one group."""
    results, _ = calibrated(random_blocks(SHAPE, 2), runtime, (0, 1, 2), **ALL)
    assert "heads" not in results[1].errors
    assert "kv_group_order" not in results[1].changes
    shape = Shape(hidden=24, heads=6, kv_groups=3, head_dim=4, ffn=48)
    results, _ = calibrated(random_blocks(shape, 1), runtime, (0,), shape, **ALL)
    assert "heads" not in results[0].errors


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["fit", "judge", "first position", "attention", "mlp"])
def test_activations_that_are_not_finite(runtime: Runtime, where: str, value: float) -> None:
    blocks = random_blocks(SHAPE, 2)
    fit, judge = hidden_states(SHAPE, 3, 1), hidden_states(SHAPE, 2, 2)
    if where == "fit":
        fit[1][5, 0, 3] = value
    elif where == "judge":
        judge[1][5, 0, 3] = value
    elif where == "first position":
        judge[1][0, 0, 3] = value
    else:
        name = "self_attn.v_proj.weight" if where == "attention" else "mlp.up_proj.weight"
        blocks[0][name][0, 0] = value
    with pytest.raises(UserError, match="not finite") as caught:
        calibrated(blocks, runtime, (0, 1, 2), sample=Sample.of(fit, judge), **ALL)
    assert "\n" not in str(caught.value)


def test_one_branch_changes_nothing(runtime: Runtime) -> None:
    plan, unit = schedules_of(SHAPE, 2, 1, (0, 1))
    calibrator = make_calibrator(random_blocks(SHAPE, 2), SHAPE, 1, runtime, **ALL)
    sample = Sample.of(hidden_states(SHAPE, 3, 1), hidden_states(SHAPE, 2, 2))
    results = calibrator.calibrate(unit, [plan.block_schedule(i) for i in unit], sample)
    for result in results.values():
        for part, name in result.kept.items():
            assert result.errors[part][name] < 1e-10


def test_the_same_sample_gives_the_same_bytes(runtime: Runtime) -> None:
    blocks = random_blocks(SHAPE, 2)
    first, second = (calibrated(blocks, runtime, (0, 1, 2), **ALL)[0] for _ in range(2))
    for i, result in first.items():
        assert result.record == second[i].record
        assert result.changes == second[i].changes
        assert all(torch.equal(t, second[i].weights[n]) for n, t in result.weights.items())


def test_a_bf16_checkpoint_is_calibrated_in_float32(runtime: Runtime) -> None:
    blocks = [{n: t.bfloat16() for n, t in b.items()} for b in random_blocks(SHAPE, 1)]
    results, _ = calibrated(blocks, runtime, (0,), **ALL)
    assert {t.dtype for t in results[0].weights.values()} == {torch.float32}


def test_calibrator_is_reusable(runtime: Runtime) -> None:
    """Units are asked for one after the other, and again."""
    blocks = random_blocks(SHAPE, 2)
    calibrator: UnitCalibrator = make_calibrator(blocks, SHAPE, BRANCHES, runtime, **ALL)
    sample = Sample.of(hidden_states(SHAPE, 4, 1), hidden_states(SHAPE, 2, 2))
    records = []
    for dropped in ((0,), (2,), (0,)):
        plan, unit = schedules_of(SHAPE, 2, BRANCHES, dropped)
        results = calibrator.calibrate(unit, [plan.block_schedule(i) for i in unit], sample)
        records.append(results[unit.start].record)
    assert records[0] == records[2] != records[1]
