"""Block-to-block distillation in the DeepSpeed engine against a bare PyTorch loop over the plain formula."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_spd.calibration.stream import BlockWeights, model_shape
from megatron_spd.checkpoint.hf import CheckpointReader
from megatron_spd.distill.batches import example_order
from megatron_spd.distill.engine import EngineSettings, deepspeed_config, end_engine, make_engine
from megatron_spd.distill.recipe import distill, units_to_train
from megatron_spd.distill.settings import DistillSettings
from megatron_spd.distill.tracking import Tracker
from megatron_spd.distill.units import UnitStore, distilled_block
from megatron_spd.grouping.permute import planned_weights
from megatron_spd.models.build import BlockUnit
from megatron_spd.plan import SPDPlan
from megatron_spd.runtime.distributed import initialize
from megatron_spd.stages import make_streamer, run_distillation
from tests.models import make_llama
from tests.ranks import run_ranks
from tests.reference import Shape, blocks_forward

BRANCHES, LAYERS, STEPS, RATE, SEED = 2, 4, 5, 3e-3, 1234
#: Blocks 0 and 3 alone, blocks 1 and 2 joined by a dropped MLP point.
DROPPED = (0, 3, 6)
SHAPE = Shape(32, 8, 4, 4, 48)
#: What is trained under DROPPED (block 3 is dropped zero-shot), and what else the walk passes.
UNITS = (range(0, 1), range(1, 3))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("m") / "m", heads=8, kv=4, layers=LAYERS, biases=True)


def make_plan(folder: Path) -> SPDPlan:
    plan = SPDPlan.dense(CheckpointReader(folder).base_model(), BRANCHES).with_drops(DROPPED)
    for block in (0, 1, 2):
        plan = plan.with_block(
            block, tier="SB", recovery="b2b", kv_group_order=[2, 0, 3, 1] if block == 2 else None
        )
    plan = plan.with_block(1, mlp_norm=True).with_block(2, attention_norm=True)
    return plan.with_block(3, tier="ISB", recovery="zs")


def make_tokens() -> Tensor:
    return torch.randint(3, 300, (5, 12), generator=torch.Generator().manual_seed(1))


def initial_weights(folder: Path, plan: SPDPlan) -> BlockWeights:
    """The plan's weights, a little off, so that the student's weights are not the teacher's."""
    planned = planned_weights(CheckpointReader(folder), plan)

    def weights(block: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(block)
        noise = {n: torch.randn(t.shape, generator=generator) for n, t in planned(block).items()}
        return {n: t + 0.02 * noise[n] for n, t in planned(block).items()}

    return weights


def settings(
    tmp: Path, replicas: int = 1, accumulation: int = 1, stage: int = 0, dtype: str = "fp32", **changes: Any
) -> DistillSettings:
    """Every optimizer step sees the same four sequences, however they are cut, at a constant rate."""
    config = tmp / "ds.json"
    # DeepSpeed would leave parameters as small as these whole on every rank.
    zero = {"stage3_param_persistence_threshold": 0}
    config.write_text(json.dumps({"scheduler": None, "zero_optimization": zero}))
    micro = 4 // (replicas * accumulation)
    engine = EngineSettings(RATE, micro, accumulation, 1.0, 0.0, 0.0, stage, dtype, str(config))
    return DistillSettings(engine, STEPS, **{"inputs": "teacher", "seed": SEED} | changes)


def distilled(
    model: Path, out: Path, tp: int, given: DistillSettings, start: Path | None = None
) -> list[dict[str, Any]]:
    """The records; ``start``: blocks of an earlier distillation to begin with, where it kept any."""
    runtime = initialize(tp)
    reader = CheckpointReader(model)
    plan, tokens = make_plan(model), make_tokens()
    store = UnitStore(out, given.identity(plan, tokens), runtime)
    initial = initial_weights(model, plan)

    def weights(block: int) -> dict[str, Tensor]:
        kept = distilled_block(start, block) if start is not None else None
        return initial(block) if kept is None else kept

    return run_distillation(reader, runtime, plan, tokens, given, store, Tracker("none", out), weights)


# ---- the reference ------------------------------------------------------------------------------------------------

Blocks = dict[int, dict[str, Tensor]]


def reference(
    model: Path, loss: str = "mse", inputs: str = "teacher"
) -> tuple[Blocks, dict[int, list[float]]]:
    """The best trained blocks, and losses by unit start, in float64."""
    reader, plan = CheckpointReader(model), make_plan(model)
    weights = initial_weights(model, plan)
    x = reader.get(reader.family.embedding)[make_tokens()].transpose(0, 1).double()
    own, blocks, losses = x, {}, {}
    for unit in UNITS:
        behind = blocks_forward(x, [_double(reader.block(i)) for i in unit], SHAPE, 1, ())
        student = [{n: t.requires_grad_() for n, t in _double(weights(i)).items()} for i in unit]
        dropped = [p - 2 * unit.start for p in DROPPED if p // 2 in unit]
        order = example_order(4, 4 * STEPS, SEED * 1_000_003 + unit.start, inputs).split(4)
        # A teacher's example 0..3, or the student's own, 4..7.
        examples = torch.cat([x[:, :4], own[:, :4]], 1)
        batches = [(examples[:, step], behind[:, step % 4]) for step in order]
        judge = (x if inputs == "teacher" else own)[:, 4:], behind[:, 4:]
        losses[unit.start], best = _train(student, batches, judge, dropped, loss)
        blocks |= dict(zip(unit, best, strict=True))
        own, x = blocks_forward(own, best, SHAPE, BRANCHES, dropped), behind
    return blocks, losses


def _double(weights: Any) -> dict[str, Tensor]:
    return {n: t.double().clone() for n, t in weights.items()}


def _train(
    student: list[dict[str, Tensor]],
    batches: list[tuple[Tensor, Tensor]],
    judge: tuple[Tensor, Tensor],
    dropped: list[int],
    name: str,
) -> tuple[list[float], list[dict[str, Tensor]]]:
    """The loss of every step, and the state with the least loss on ``judge``, which is looked at after every step."""

    def loss_of(x: Tensor, target: Tensor) -> Tensor:
        difference = (blocks_forward(x, student, SHAPE, BRANCHES, dropped) - target)[1:].square()
        if name == "nmse":
            difference = difference.sum(-1) / target[1:].square().sum(-1)
        return difference.mean()

    parameters = [t for w in student for t in w.values()]
    optimizer = torch.optim.AdamW(parameters, RATE, betas=(0.9, 0.95), weight_decay=0.0)
    losses, least, best = [], float("inf"), []
    for batch in batches:
        loss = loss_of(*batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        judged = float(loss_of(*judge).detach())
        if judged < least:
            least, best = judged, [_double({n: t.detach() for n, t in w.items()}) for w in student]
    return losses, best


# ---- tests --------------------------------------------------------------------------------------------------------


def check_blocks(out: Path, wanted_blocks: Blocks) -> None:
    for block, wanted in wanted_blocks.items():
        got = distilled_block(out, block)
        assert got is not None
        assert set(got) == set(wanted)
        for name, tensor in wanted.items():
            # Adam divides by the size of the gradient: where that is tiny its sign may differ, for a step of
            # at most RATE.
            off = (got[name].double() - tensor).abs() >= 1e-4
            assert int(off.sum()) <= max(1, 0.01 * off.numel()), (block, name)


@pytest.mark.parametrize(
    ("ranks", "tp", "accumulation", "stage", "inputs"),
    [
        (1, 1, 1, 0, "teacher"),
        (2, 2, 1, 0, "teacher"),
        (2, 2, 2, 1, "mixed"),
        (2, 2, 1, 2, "student"),
        (2, 1, 1, 1, "mixed"),
        (4, 2, 1, 0, "student"),
        (4, 2, 2, 2, "teacher"),
        (4, 2, 1, 1, "mixed"),
        # M > G: two ranks share a branch.
        (4, 4, 1, 0, "student"),
        (4, 4, 1, 1, "teacher"),
        (2, 1, 1, 3, "student"),
        (4, 2, 2, 3, "mixed"),
    ],
)
def test_equals_a_plain_loop(
    model: Path, tmp_path: Path, ranks: int, tp: int, accumulation: int, stage: int, inputs: str
) -> None:
    given = settings(tmp_path, ranks // tp, accumulation, stage, inputs=inputs)
    records = run_ranks(ranks, distilled, model, tmp_path / "out", tp, given)[0]
    blocks, losses = reference(model, inputs=inputs)
    assert [r["blocks"] for r in records] == [list(u) for u in UNITS]
    for record in records:
        assert record["losses"] == pytest.approx(losses[record["blocks"][0]], rel=1e-4)
        assert record["kept"]
        assert record["loss_after"] < record["loss_before"]
        assert record["held_out"][0] == [0, record["loss_before"]]
        assert record["held_out"][record["best_step"]] == [record["best_step"], record["loss_after"]]
    check_blocks(tmp_path / "out", blocks)
    assert distilled_block(tmp_path / "out", 3) is None


def elements_under_zero_3(model: Path, given: DistillSettings) -> tuple[int, int, int]:
    """After a step: elements of parameters that are whole on this rank, of its parts of them, and of the unit."""
    runtime, reader, plan = initialize(1), CheckpointReader(model), make_plan(model)
    student = BlockUnit(model_shape(reader), [plan.block_schedule(0)], runtime, torch.float32)
    student.load_block(0, planned_weights(reader, plan)(0))
    total = sum(p.numel() for p in student.parameters())
    engine = make_engine(student, deepspeed_config(given.engine, 1))
    engine.backward(engine(torch.ones(6, 2, SHAPE.hidden)).square().mean())
    engine.step()
    parameters = list(student.parameters())
    end_engine(engine)
    # DeepSpeed's own has no forward-mode derivatives, which calibration asks for.
    assert torch.nn.functional.linear is torch._C._nn.linear
    return sum(p.numel() for p in parameters), sum(p.ds_tensor.numel() for p in parameters), total


def test_zero_3_leaves_each_replica_its_part(model: Path, tmp_path: Path) -> None:
    for whole, part, total in run_ranks(
        2, elements_under_zero_3, model, settings(tmp_path, 2, accumulation=1, stage=3)
    ):
        assert whole == 0
        # Each of twenty tensors at most is filled up to an even number.
        assert total / 2 <= part <= total / 2 + 20


def test_the_kinds_of_inputs_differ(model: Path) -> None:
    # Else the comparisons above would not tell them apart.
    last = [reference(model, inputs=kind)[1][1] for kind in ("teacher", "student", "mixed")]
    assert abs(last[0][0] / last[1][0] - 1) > 0.01
    assert abs(last[0][0] / last[2][0] - 1) > 0.01


def test_normalised_loss(model: Path, tmp_path: Path) -> None:
    given = settings(tmp_path, loss="nmse")
    records = run_ranks(2, distilled, model, tmp_path / "out", 2, given)[0]
    losses = reference(model, "nmse")[1]
    for record in records:
        assert record["losses"] == pytest.approx(losses[record["blocks"][0]], rel=1e-4)


def test_fisher_loss_is_the_same_on_any_number_of_ranks(model: Path, tmp_path: Path) -> None:
    one, two = (
        run_ranks(m, distilled, model, tmp_path / f"{m}", m, settings(tmp_path, loss="fisher"))[0]
        for m in (1, 2)
    )
    mse = run_ranks(1, distilled, model, tmp_path / "mse", 1, settings(tmp_path))[0]
    for a, b, plain in zip(one, two, mse, strict=True):
        assert a["losses"] == pytest.approx(b["losses"], rel=1e-3)
        assert a["losses"] != pytest.approx(plain["losses"], rel=1e-2)
        assert a["loss_after"] < a["loss_before"]


@pytest.mark.parametrize("stage", [1, 2])
def test_bf16(model: Path, tmp_path: Path, stage: int) -> None:
    given = settings(tmp_path, stage=stage, dtype="bf16")
    records = run_ranks(2, distilled, model, tmp_path / "out", 2, given)[0]
    losses = reference(model)[1]
    for record in records:
        assert record["losses"] == pytest.approx(losses[record["blocks"][0]], rel=0.1)
        assert record["losses"][-1] < record["losses"][0]


def with_rate(given: DistillSettings, rate: float) -> DistillSettings:
    engine = dataclasses.replace(given.engine, learning_rate=rate, gradient_clipping=1e9)
    return dataclasses.replace(given, engine=engine)


def test_weights_that_do_not_help_are_not_kept(model: Path, tmp_path: Path) -> None:
    given = with_rate(settings(tmp_path), 50.0)
    records = run_ranks(1, distilled, model, tmp_path / "out", 1, given)[0]
    assert not any(r["kept"] for r in records)
    assert all(r["loss_after"] == r["loss_before"] for r in records)
    assert distilled_block(tmp_path / "out", 0) is None


def test_the_best_state_is_kept_not_the_last(model: Path, tmp_path: Path) -> None:
    long = settings(tmp_path, tokens=4 * 12 * 40)
    record = run_ranks(1, distilled, model, tmp_path / "long", 1, long)[0][0]
    losses = dict(record["held_out"])
    assert (len(record["losses"]), len(losses)) == (40, 9)
    assert record["loss_after"] == min(losses.values()) < losses[40]
    # What is stored is that state: a training that starts with it finds its loss.
    short = dataclasses.replace(settings(tmp_path), max_seconds=0.0)
    again = run_ranks(1, distilled, model, tmp_path / "again", 1, short, start=tmp_path / "long")[0][0]
    assert again["loss_before"] == pytest.approx(record["loss_after"], rel=1e-6)
    assert (
        min(
            abs(loss / record["loss_after"] - 1)
            for step, loss in losses.items()
            if step != record["best_step"]
        )
        > 1e-4
    )


def test_no_time_means_one_step(model: Path, tmp_path: Path) -> None:
    given = dataclasses.replace(settings(tmp_path), max_seconds=0.0)
    records = run_ranks(1, distilled, model, tmp_path / "out", 1, given)[0]
    assert [len(r["losses"]) for r in records] == [1, 1]
    assert [len(r["held_out"]) for r in records] == [2, 2]


def count_blocks_loaded(model: Path, out: Path, given: DistillSettings) -> int:
    """Blocks that a finished distillation reads when it is asked for again."""
    runtime = initialize(1)
    reader, plan = CheckpointReader(model), make_plan(model)
    streamer = make_streamer(reader, runtime, plan)
    loaded: list[int] = []
    weights = streamer.weights
    streamer.weights = lambda block: (loaded.append(block), weights(block))[1]
    store = UnitStore(out, given.identity(plan, make_tokens()), runtime)
    distill(streamer, plan, make_tokens(), given, store, Tracker("none", out))
    return len(loaded)


@pytest.mark.parametrize("inputs", ["teacher", "mixed"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_finished_units_are_not_computed_again(model: Path, tmp_path: Path, inputs: str, ranks: int) -> None:
    given = settings(tmp_path, inputs=inputs)
    first = run_ranks(ranks, distilled, model, tmp_path / "out", ranks, given)[0]
    before = (tmp_path / "out" / "unit_0001_0002.safetensors").read_bytes()
    assert run_ranks(1, count_blocks_loaded, model, tmp_path / "out", given) == [0]
    again = run_ranks(ranks, distilled, model, tmp_path / "out", ranks, given)[0]
    assert json.dumps(again) == json.dumps(first)
    # One unit lost: only the blocks up to its end are walked, and its weights come out the same. The student's own
    # inputs come from the stored unit then.
    for suffix in ("json", "safetensors"):
        (tmp_path / "out" / f"unit_0001_0002.{suffix}").unlink()
    run_ranks(ranks, distilled, model, tmp_path / "out", ranks, given)
    assert (tmp_path / "out" / "unit_0001_0002.safetensors").read_bytes() == before


def test_units_to_train_are_those_with_a_block_to_distil(model: Path) -> None:
    assert tuple(units_to_train(make_plan(model))) == UNITS


CONFIGS = sorted((Path(__file__).parents[2] / "launch" / "ds_config").glob("*.json"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_shipped_deepspeed_files_train_as_a_single_process_does(
    model: Path, tmp_path: Path, path: Path
) -> None:
    """Two data-parallel ranks with a file of launch/ds_config against one process without any."""
    dtype = path.stem.split("_")[1]
    one = EngineSettings(RATE, 4, 1, 1.0, 0.0, 0.0, 0, "fp32")
    two = dataclasses.replace(one, micro_batch_size=2, dtype=dtype, config_file=str(path))
    given = [DistillSettings(engine, STEPS, inputs="teacher", seed=SEED) for engine in (one, two)]
    wanted = run_ranks(1, distilled, model, tmp_path / "one", 1, given[0])[0]
    records = run_ranks(2, distilled, model, tmp_path / "two", 1, given[1])[0]
    for record, expected in zip(records, wanted, strict=True):
        rel = 1e-4 if dtype == "fp32" else 0.1
        assert record["losses"] == pytest.approx(expected["losses"], rel=rel)
        assert record["losses"][-1] < record["losses"][0]
