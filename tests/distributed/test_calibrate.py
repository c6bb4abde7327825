"""Calibration over ranks, its results through export and load, and on a real model's blocks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_spd.calibration.stream import BlockStreamer, model_shape
from megatron_spd.calibration.text import embedded_text, token_batches
from megatron_spd.checkpoint.export import export
from megatron_spd.checkpoint.hf import CheckpointReader
from megatron_spd.errors import UserError
from megatron_spd.evaluate.generate import load_for_generation
from megatron_spd.evaluate.perplexity import plan_perplexity
from megatron_spd.grouping.calibrate import BlockResult, Ingredients, UnitCalibrator
from megatron_spd.grouping.formulas import AttentionSettings
from megatron_spd.grouping.permute import permute_block
from megatron_spd.grouping.sample import Sample
from megatron_spd.grouping.walk import DenseStates, calibrate_plan
from megatron_spd.models.build import inverse_frequencies
from megatron_spd.plan import SPDPlan
from megatron_spd.runtime.distributed import initialize
from megatron_spd.stages import make_streamer
from tests.calibration_cases import NOTHING, hidden_states, make_calibrator, random_blocks, schedules_of
from tests.distributed.test_model import megatron_logits
from tests.models import make_llama
from tests.ranks import run_ranks
from tests.reference import Shape

SHAPE = Shape(hidden=24, heads=6, kv_groups=6, head_dim=4, ffn=48)
ALL: dict[str, Any] = {"heads": "joint", "neurons": True, "shift": True, "norm": True, "refit": True}
ONE_BY_ONE: dict[str, dict[str, Any]] = {
    "shift": {"shift": True},
    "norm": {"norm": True},
    "refit": {"refit": True},
    "neurons": {"neurons": True},
    "heads and neurons": {"heads": "joint", "neurons": True},
    "all": ALL,
}


# ---- ranks ----------------------------------------------------------------------------------------------------------


def shared_out(ranks: int, dropped: tuple[int, ...], ingredients: dict[str, Any]) -> list[dict[str, Any]]:
    """Results by block of a unit when its sequences are shared out; with three ranks one of them judges nothing."""
    runtime = initialize(ranks)
    layers = max(dropped) // 2 + 2
    calibrator = make_calibrator(random_blocks(SHAPE, layers), SHAPE, 3, runtime, **ingredients)
    plan, unit = schedules_of(SHAPE, layers, 3, dropped)
    sample = Sample.of(
        hidden_states(SHAPE, 8, 1)[runtime.rank :: ranks], hidden_states(SHAPE, 2, 2)[runtime.rank :: ranks]
    )
    results = calibrator.calibrate(unit, [plan.block_schedule(i) for i in unit], sample)
    return [{"weights": r.weights, "changes": r.changes, **r.record} for r in results.values()]


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("dropped", [(0,), (0, 1, 2)])
def test_any_number_of_ranks_finds_the_same(ranks: int, dropped: tuple[int, ...]) -> None:
    """Sums over ranks are the sums over sequences: the same orders, the same errors, the same tensors to rounding."""
    ingredients = ALL | {"heads": "none"}
    alone = run_ranks(1, shared_out, 1, dropped, ingredients)[0]
    together = run_ranks(ranks, shared_out, ranks, dropped, ingredients)
    for wanted, got in zip(alone, together[0], strict=True):
        assert got["changes"] == wanted["changes"]
        assert got["kept"] == wanted["kept"]
        for part, errors in wanted["errors"].items():
            assert got["errors"][part] == pytest.approx(errors, rel=1e-4)
        for name, tensor in wanted["weights"].items():
            assert (got["weights"][name] - tensor).norm() <= 1e-4 * tensor.norm(), name
    assert any("neuron_order" in block["changes"] for block in alone)


@pytest.mark.parametrize("ranks", [2, 3])
def test_all_ranks_return_the_same_bytes(ranks: int) -> None:
    first, *others = run_ranks(ranks, shared_out, ranks, (0, 1, 2), ALL)
    assert list(first[0]["errors"]["heads"]) == ["original", "published", "joint"]
    for other in others:
        for mine, theirs in zip(first, other, strict=True):
            weights, same = mine.pop("weights"), theirs.pop("weights")
            assert mine == theirs
            assert weights.keys() == same.keys()
            assert all(torch.equal(weights[name], same[name]) for name in weights)
            mine["weights"] = weights


def refused(ranks: int, heads: str, where: str) -> str:
    """What this rank says when the last rank's activations, or all ranks' weights, are not finite."""
    runtime = initialize(ranks)
    blocks = random_blocks(SHAPE, 1)
    fit, judge = (
        hidden_states(SHAPE, 4, 1)[runtime.rank :: ranks],
        hidden_states(SHAPE, 2, 2)[runtime.rank :: ranks],
    )
    if where == "weights":
        blocks[0]["self_attn.k_proj.weight"][0, 0] = math.nan
    elif runtime.rank == ranks - 1:
        (fit if where == "fit" else judge)[0][3, 0, 0] = math.nan
    plan, unit = schedules_of(SHAPE, 1, 3, (0,))
    calibrator = make_calibrator(blocks, SHAPE, 3, runtime, **(ALL | {"heads": heads}))
    try:
        calibrator.calibrate(unit, [plan.block_schedule(0)], Sample.of(fit, judge))
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("where", ["fit", "judge", "weights"])
@pytest.mark.parametrize("heads", ["none", "joint"])
def test_all_ranks_refuse_what_is_not_finite(heads: str, where: str) -> None:
    """A rank that raised alone would leave the others waiting."""
    for message in run_ranks(2, refused, 2, heads, where):
        assert "not finite" in message
        assert "\n" not in message


# ---- whole models ---------------------------------------------------------------------------------------------------


def calibrator_of(streamer: BlockStreamer, plan: SPDPlan, ingredients: dict[str, Any]) -> UnitCalibrator:
    reader = streamer.reader
    settings = AttentionSettings(
        reader.head_dim, inverse_frequencies(streamer.shape), reader.config["rms_norm_eps"]
    )
    return UnitCalibrator(
        reader.block,
        reader.family,
        plan.base_model,
        settings,
        plan.branches,
        streamer.runtime,
        Ingredients(**(NOTHING | ingredients)),
    )


def calibrated_export(
    base: Path, out: Path, ranks: int, dropped: tuple[int, ...], ingredients: dict[str, Any], tokens: Tensor
) -> tuple[dict[str, Any], float, float]:
    """Calibrate and export; the plan, and the perplexity of ``tokens`` with the calibrated weights and the export's."""
    runtime = initialize(ranks)
    reader = CheckpointReader(base)
    streamer = make_streamer(reader, runtime)
    plan = SPDPlan.dense(reader.base_model(), 3).with_drops(dropped)
    results: dict[int, BlockResult] = {}
    calibrator = calibrator_of(streamer, plan, ingredients)
    calibrate_plan(
        streamer, calibrator, plan, tokens, plan.units(), lambda unit, found: results.update(found)
    )
    for block, result in results.items():
        plan = plan.with_block(block, **result.changes)

    def weights(block: int) -> dict[str, Tensor]:
        return results[block].weights if block in results else reader.block(block)

    before, _ = plan_perplexity(BlockStreamer(reader, runtime, torch.float32, weights), plan, tokens)
    if runtime.is_main:
        export(reader, plan, weights, out)
    runtime.barrier()
    again = CheckpointReader(out)
    assert again.plan == plan
    after, _ = plan_perplexity(make_streamer(again, runtime), plan, tokens)
    return plan.to_dict(), before, after


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("ingredients", ONE_BY_ONE.values(), ids=ONE_BY_ONE.keys())
def test_every_ingredient_survives_export_and_load(
    tmp_path: Path, ingredients: dict[str, Any], ranks: int
) -> None:
    """The same perplexity before and after, and transformers' logits are those of the Megatron layers."""
    base = make_llama(tmp_path / "m", hidden=48, heads=12, kv=6, ffn=48, layers=4, biases=True, tied=False)
    tokens = torch.randint(3, 300, (16, 24), generator=torch.Generator().manual_seed(1))
    dropped = (0, 2, 3, 4)
    found = run_ranks(ranks, calibrated_export, base, tmp_path / "x", ranks, dropped, ingredients, tokens)
    plan, before, after = found[0]
    assert all(other == found[0] for other in found)
    assert after == pytest.approx(before, rel=1e-6)
    _check_changes(plan["blocks"], ingredients)
    ids = tokens[:2]
    with torch.no_grad():
        wanted = load_for_generation(tmp_path / "x")(ids).logits
        dense = load_for_generation(base)(ids).logits
    got = run_ranks(ranks, megatron_logits, tmp_path / "x", ids, ranks, 3)[0]
    assert (got - wanted).abs().max() < 1e-4
    assert (got - dense).abs().max() > 0.01


def _check_changes(blocks: list[dict[str, Any]], ingredients: dict[str, Any]) -> None:
    """What may have been changed has been, somewhere, and nothing else."""
    changed = {field for block in blocks for field, value in block.items() if value not in (None, False, "")}
    fields = {
        "heads": {"kv_group_order"},
        "neurons": {"neuron_order"},
        "shift": {"mlp_shift", "attention_shift"},
        "norm": {"mlp_norm", "attention_norm"},
        "refit": {"mlp_norm", "attention_norm"},
    }
    allowed = set().union(*(fields[name] for name in ingredients))
    assert changed <= allowed
    for name in ingredients:
        assert changed & fields[name], name
    # Nothing is dropped in the last block.
    assert not any(value for value in blocks[-1].values())


# ---- a real model ---------------------------------------------------------------------------------------------------


def real_blocks(folder: Path, blocks: list[int], ingredients: dict[str, Any]) -> list[dict[str, float]]:
    """Errors of real blocks without their attention's sync, relative to the dense MLP's output, on text that neither
    fitted nor judged; and how far the orders alone take the dense block from itself, relative."""
    runtime = initialize(1)
    reader = CheckpointReader(folder)
    streamer = make_streamer(reader, runtime)
    tokens = token_batches(reader.tokenizer(), embedded_text(), 16, 128)
    states, unseen = DenseStates(streamer, tokens[:12]), streamer.embed(tokens[12:])
    plan = SPDPlan.dense(reader.base_model(), 3)
    calibrator = calibrator_of(streamer, plan, ingredients)
    measured = []
    for block in range(max(blocks) + 1):
        if block in blocks:
            measured.append(_measured(streamer, calibrator, plan, block, states.in_front_of(block), unseen))
        unseen = streamer.advance(block, unseen)
    return measured


def _measured(
    streamer: BlockStreamer,
    calibrator: UnitCalibrator,
    plan: SPDPlan,
    block: int,
    sample: Sample,
    unseen: list[Tensor],
) -> dict[str, float]:
    reader, runtime = streamer.reader, streamer.runtime
    plan = plan.with_drops([2 * block])
    (result,) = calibrator.calibrate(range(block, block + 1), [plan.block_schedule(block)], sample).values()
    changed = plan.with_block(block, **result.changes)
    orders = (result.changes.get(name) for name in ("kv_group_order", "neuron_order"))
    moved = permute_block(reader.block(block), reader.family, plan.base_model, reader.head_dim, *orders)

    def error(weights: dict[str, Tensor], given: SPDPlan, stream: list[Tensor]) -> float:
        dense = streamer.advance(block, stream)
        own = BlockStreamer(reader, runtime, torch.float32, lambda i: weights)
        after, _ = own.advance_pending(block, given.block_schedule(block), stream, [None] * len(stream))
        return sum(float((a - d)[1:].double().square().sum()) for a, d in zip(after, dense, strict=True))

    judge = [chunk.dense for chunk in sample.judge]
    dense_plan = plan.with_drops([])
    silent = {n: torch.zeros_like(t) if "down_proj" in n else t for n, t in reader.block(block).items()}
    size = error(silent, dense_plan, unseen)
    return {
        "none": error(reader.block(block), plan, unseen) / size,
        "kept": error(result.weights, changed, unseen) / size,
        "orders on the dense block": error(moved, dense_plan, unseen) / size,
        "recorded": result.errors["mlp"][result.kept["mlp"]],
        "judged": error(result.weights, changed, judge) / error(silent, dense_plan, judge),
    }


@pytest.mark.slow
def test_a_real_block(smollm2: Path) -> None:
    shape = model_shape(CheckpointReader(smollm2))
    assert shape.kv_groups == 3
    grouped = run_ranks(1, real_blocks, smollm2, [4, 12], {"neurons": True}, timeout=200)[0]
    everything = run_ranks(1, real_blocks, smollm2, [4, 12], ALL, timeout=200)[0]
    for neurons, whole in zip(grouped, everything, strict=True):
        assert neurons["orders on the dense block"] < 1e-10
        assert neurons["kept"] < 0.7 * neurons["none"]
        assert whole["kept"] < neurons["kept"]
        for errors in (neurons, whole):
            assert errors["recorded"] == pytest.approx(errors["judged"], rel=1e-3)
