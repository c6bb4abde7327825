"""Block-to-block distillation in the DeepSpeed engine against a bare PyTorch loop over the plain formula."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_spd.checkpoint.hf import CheckpointReader
from megatron_spd.distill.engine import EngineSettings
from megatron_spd.distill.recipe import DistillSettings, units_to_train
from megatron_spd.distill.tracking import Tracker
from megatron_spd.distill.units import UnitStore, distilled_block
from megatron_spd.plan import SPDPlan
from megatron_spd.runtime.distributed import initialize
from megatron_spd.stages import make_streamer, run_distillation
from tests.models import make_llama
from tests.ranks import run_ranks
from tests.reference import Shape, blocks_forward

BRANCHES, LAYERS, STEPS, RATE = 2, 4, 5, 3e-3
#: Blocks 0 and 3 alone, blocks 1 and 2 joined by a dropped MLP point.
DROPPED = (0, 3, 6)
SHAPE = Shape(32, 4, 2, 8, 48)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("m") / "m", layers=LAYERS, biases=True)


def make_plan(folder: Path) -> SPDPlan:
    plan = SPDPlan.dense(CheckpointReader(folder).base_model(), BRANCHES).with_drops(DROPPED)
    for block in (0, 1, 2):
        plan = plan.with_block(
            block, tier="SB", recovery="b2b", kv_group_order=[1, 0] if block == 2 else None
        )
    plan = plan.with_block(1, mlp_norm=True).with_block(2, attention_norm=True)
    return plan.with_block(3, tier="ISB", recovery="zs")


def make_tokens() -> Tensor:
    return torch.randint(3, 300, (5, 12), generator=torch.Generator().manual_seed(1))


def settings(
    tmp: Path, replicas: int, accumulation: int, stage: int, dtype: str, loss: str = "mse"
) -> DistillSettings:
    """Every optimizer step sees the same four sequences, however they are cut, at a constant rate."""
    config = tmp / "ds.json"
    config.write_text(json.dumps({"scheduler": None}))
    micro = 4 // (replicas * accumulation)
    engine = EngineSettings(RATE, micro, accumulation, 1.0, 0.0, 0.0, stage, dtype, str(config))
    return DistillSettings(engine, STEPS, loss)


def distilled(model: Path, out: Path, tp: int, given: DistillSettings) -> list[dict[str, Any]]:
    runtime = initialize(tp)
    reader = CheckpointReader(model)
    plan, tokens = make_plan(model), make_tokens()
    store = UnitStore(out, given.identity(plan, tokens), runtime)
    return run_distillation(reader, runtime, plan, tokens, given, store, Tracker("none", out))


def reference(
    model: Path, loss_name: str = "mse"
) -> tuple[dict[int, dict[str, Tensor]], dict[int, list[float]]]:
    """Trained blocks and losses by unit start, in float64."""
    reader, plan = CheckpointReader(model), make_plan(model)
    from megatron_spd.grouping.permute import planned_weights

    x = reader.get(reader.family.embedding)[make_tokens()].transpose(0, 1).double()
    weights = planned_weights(reader, plan)
    blocks, losses = {}, {}
    for unit in units_to_train(plan):
        for i in range(max([*blocks, -1]) + 1, unit.start):
            x = blocks_forward(x, [_double(reader.block(i))], SHAPE, 1, ())
        inputs = x
        x = blocks_forward(x, [_double(reader.block(i)) for i in unit], SHAPE, 1, ())
        student = [{n: t.requires_grad_() for n, t in _double(weights(i)).items()} for i in unit]
        dropped = [p - 2 * unit.start for p in DROPPED if p // 2 in unit]
        losses[unit.start] = _train(student, inputs[:, :4], x[:, :4], dropped, loss_name)
        blocks |= dict(zip(unit, student, strict=True))
    return blocks, losses


def _double(weights: Any) -> dict[str, Tensor]:
    return {n: t.double().clone() for n, t in weights.items()}


def _train(
    student: list[dict[str, Tensor]], x: Tensor, target: Tensor, dropped: list[int], name: str
) -> list[float]:
    parameters = [t for w in student for t in w.values()]
    optimizer = torch.optim.AdamW(parameters, RATE, betas=(0.9, 0.95), weight_decay=0.0)
    losses = []
    for _ in range(STEPS):
        difference = (blocks_forward(x, student, SHAPE, BRANCHES, dropped) - target)[1:].square()
        if name == "nmse":
            difference = difference.sum(-1) / target[1:].square().sum(-1)
        loss = difference.mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize(
    ("ranks", "tp", "accumulation", "stage"),
    [
        (1, 1, 1, 0),
        (2, 2, 1, 0),
        (2, 2, 2, 1),
        (2, 2, 1, 2),
        (2, 1, 1, 1),
        (4, 2, 1, 0),
        (4, 2, 2, 2),
        (4, 2, 1, 1),
    ],
)
def test_equals_a_plain_loop(
    model: Path, tmp_path: Path, ranks: int, tp: int, accumulation: int, stage: int
) -> None:
    given = settings(tmp_path, ranks // tp, accumulation, stage, "fp32")
    records = run_ranks(ranks, distilled, model, tmp_path / "out", tp, given)[0]
    blocks, losses = reference(model)
    assert [r["blocks"] for r in records] == [[0], [1, 2]]
    for record in records:
        assert record["losses"] == pytest.approx(losses[record["blocks"][0]], rel=1e-4)
        assert record["kept"]
        assert record["loss_after"] < record["loss_before"]
    for block, wanted in blocks.items():
        got = distilled_block(tmp_path / "out", block)
        assert got is not None
        assert set(got) == set(wanted)
        for name, tensor in wanted.items():
            # Adam divides by the size of the gradient: where that is tiny its sign may differ, for a step of
            # at most RATE.
            close = (got[name].double() - tensor).abs() < 1e-4
            assert close.double().mean() > 0.99, (block, name)
    assert distilled_block(tmp_path / "out", 3) is None


def test_normalised_loss(model: Path, tmp_path: Path) -> None:
    given = settings(tmp_path, 1, 1, 0, "fp32", "nmse")
    records = run_ranks(2, distilled, model, tmp_path / "out", 2, given)[0]
    losses = reference(model, "nmse")[1]
    for record in records:
        assert record["losses"] == pytest.approx(losses[record["blocks"][0]], rel=1e-4)


@pytest.mark.parametrize("stage", [1, 2])
def test_bf16(model: Path, tmp_path: Path, stage: int) -> None:
    records = run_ranks(2, distilled, model, tmp_path / "out", 2, settings(tmp_path, 1, 1, stage, "bf16"))[0]
    losses = reference(model)[1]
    for record in records:
        assert record["losses"] == pytest.approx(losses[record["blocks"][0]], rel=0.1)
        assert record["losses"][-1] < record["losses"][0]


def test_weights_that_do_not_help_are_not_kept(model: Path, tmp_path: Path) -> None:
    given = settings(tmp_path, 1, 1, 0, "fp32")
    harmful = EngineSettings(50.0, 4, 1, 1e9, 0.0, 0.0, 0, "fp32", given.engine.config_file)
    records = run_ranks(1, distilled, model, tmp_path / "out", 1, DistillSettings(harmful, 1))[0]
    assert not any(r["kept"] for r in records)
    assert distilled_block(tmp_path / "out", 0) is None


def count_blocks_loaded(model: Path, out: Path, given: DistillSettings) -> int:
    """Blocks that a finished distillation reads when it is asked for again."""
    runtime = initialize(1)
    reader, plan = CheckpointReader(model), make_plan(model)
    streamer = make_streamer(reader, runtime, plan)
    loaded: list[int] = []
    weights = streamer.weights
    streamer.weights = lambda block: (loaded.append(block), weights(block))[1]
    from megatron_spd.distill.recipe import distill

    store = UnitStore(out, given.identity(plan, make_tokens()), runtime)
    distill(streamer, plan, make_tokens(), given, store, Tracker("none", out))
    return len(loaded)


def test_finished_units_are_not_computed_again(model: Path, tmp_path: Path) -> None:
    given = settings(tmp_path, 1, 1, 0, "fp32")
    first = run_ranks(1, distilled, model, tmp_path / "out", 1, given)[0]
    before = (tmp_path / "out" / "unit_0001_0002.safetensors").read_bytes()
    assert run_ranks(1, count_blocks_loaded, model, tmp_path / "out", given) == [0]
    assert run_ranks(1, distilled, model, tmp_path / "out", 1, given)[0] == first
    # One unit lost: only the blocks up to its end are walked, and its weights come out the same.
    for suffix in ("json", "safetensors"):
        (tmp_path / "out" / f"unit_0001_0002.{suffix}").unlink()
    run_ranks(1, distilled, model, tmp_path / "out", 1, given)
    assert (tmp_path / "out" / "unit_0001_0002.safetensors").read_bytes() == before
