"""The finishing pass against a bare PyTorch loop over the plain formula, and what a killed one ends with."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_spd.checkpoint.hf import CheckpointReader
from megatron_spd.config import DistillOptions
from megatron_spd.distill import checkpoints
from megatron_spd.distill.batches import example_order
from megatron_spd.distill.engine import EngineSettings
from megatron_spd.distill.finish import blocks_to_finish, finish
from megatron_spd.distill.loop import TrainingLoop
from megatron_spd.distill.settings import FinishSettings
from megatron_spd.distill.tracking import Tracker
from megatron_spd.distill.units import FinishStore, trained_block
from megatron_spd.grouping.permute import planned_weights
from megatron_spd.plan import SPDPlan
from megatron_spd.runtime.distributed import initialize
from megatron_spd.stages import TrainingText, final_weights, make_streamer, run_training, training_stores
from tests.models import make_llama
from tests.ranks import run_ranks
from tests.reference import Shape, blocks_forward, rms_norm

BRANCHES, LAYERS, STEPS, RATE, SEED = 2, 4, 6, 1e-3, 1234
#: In block 1, between blocks 1 and 2; blocks 0 and 3 stay as they are.
DROPPED = (2, 3)
TOUCHED = [1, 2]
SHAPE = Shape(32, 8, 4, 4, 48)
VOCABULARY = 325


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untied, and with a vocabulary that two ranks have to pad."""
    folder = tmp_path_factory.mktemp("m") / "m"
    return make_llama(folder, heads=8, kv=4, layers=LAYERS, tied=False, vocabulary=VOCABULARY)


def make_plan(folder: Path) -> SPDPlan:
    plan = SPDPlan.dense(CheckpointReader(folder).base_model(), BRANCHES).with_drops(DROPPED)
    return plan.with_block(1, mlp_norm=True, recovery="b2b").with_block(2, kv_group_order=[2, 0, 3, 1])


def make_tokens() -> Tensor:
    return torch.randint(3, 300, (5, 12), generator=torch.Generator().manual_seed(1))


def settings(
    tmp: Path, replicas: int = 1, accumulation: int = 1, stage: int = 0, dtype: str = "fp32", **changes: Any
) -> FinishSettings:
    """Every optimizer step sees the same four sequences, however they are cut, at a constant rate."""
    config = tmp / "ds.json"
    # DeepSpeed would leave parameters as small as these whole on every rank.
    zero = {"stage3_param_persistence_threshold": 0}
    config.write_text(json.dumps({"scheduler": None, "zero_optimization": zero}))
    micro = 4 // (replicas * accumulation)
    engine = EngineSettings(RATE, micro, accumulation, 1.0, 0.0, 0.0, stage, dtype, str(config))
    return FinishSettings(engine, STEPS, **{"seed": SEED} | changes)


def finished(model: Path, out: Path, tp: int, given: FinishSettings) -> dict[str, Any]:
    runtime = initialize(tp)
    reader, plan, tokens = CheckpointReader(model), make_plan(model), make_tokens()
    store = FinishStore(out, given.identity(plan, tokens), runtime)
    streamer = make_streamer(reader, runtime, dtype=given.engine.dtype)
    weights = planned_weights(reader, plan)
    return finish(streamer, plan, tokens, given, store, Tracker("none", out), weights)


def reference(model: Path, which: str) -> tuple[list[dict[str, Tensor]], list[float], list[float]]:
    """The best state of the student's blocks, the losses of the steps, and the held-out losses, in float64."""
    reader, plan, tokens = CheckpointReader(model), make_plan(model), make_tokens()
    planned = planned_weights(reader, plan)
    student = [{n: t.double().clone() for n, t in planned(i).items()} for i in range(LAYERS)]
    x = reader.get(reader.family.embedding)[tokens].transpose(0, 1).double()
    norm, table = (reader.get(n).double() for n in (reader.family.final_norm, reader.family.output_layer))

    def log_p(blocks: list[dict[str, Tensor]], branches: int, dropped: tuple[int, ...], of: slice) -> Tensor:
        states = blocks_forward(x[:, of], blocks, SHAPE, branches, dropped)
        return (rms_norm(states, norm, SHAPE.eps) @ table.T).log_softmax(-1)

    base = [{n: t.double() for n, t in reader.block(i).items()} for i in range(LAYERS)]
    answer = log_p(base, 1, (), slice(None))

    def loss_of(of: slice) -> Tensor:
        wanted = answer[:, of]
        return (wanted.exp() * (wanted - log_p(student, BRANCHES, DROPPED, of))).sum(-1).mean()

    trainable = [
        t.requires_grad_()
        for i in TOUCHED
        for n, t in student[i].items()
        if which == "blocks" or "norm" in n or "shift" in n
    ]
    optimizer = torch.optim.AdamW(trainable, RATE, betas=(0.9, 0.95), weight_decay=0.0)
    train, judge = slice(0, 4), slice(4, 5)
    losses, held_out, best = [], [float(loss_of(judge).detach())], student
    for _ in range(STEPS):
        loss = loss_of(train)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        judged = float(loss_of(judge).detach())
        if judged < min(held_out):
            best = [{n: t.detach().clone() for n, t in block.items()} for block in student]
        held_out.append(judged)
    return best, losses, held_out


@pytest.mark.parametrize(
    ("ranks", "tp", "accumulation", "stage", "which", "recompute"),
    [
        (1, 1, 1, 0, "blocks", False),
        (2, 2, 1, 0, "vectors", False),
        (2, 2, 2, 1, "blocks", True),
        (2, 2, 1, 2, "blocks", False),
        (2, 1, 1, 1, "vectors", True),
        (4, 2, 1, 0, "blocks", True),
        (4, 2, 2, 2, "blocks", False),
        (4, 2, 1, 1, "blocks", False),
        # M > G: two ranks share a branch.
        (4, 4, 1, 0, "blocks", True),
        (4, 4, 1, 1, "vectors", False),
        (2, 1, 1, 3, "vectors", False),
        (4, 2, 1, 3, "blocks", True),
    ],
)
def test_equals_a_plain_loop(
    model: Path,
    tmp_path: Path,
    ranks: int,
    tp: int,
    accumulation: int,
    stage: int,
    which: Any,
    recompute: bool,
) -> None:
    given = settings(tmp_path, ranks // tp, accumulation, stage, which=which, recompute=recompute)
    records = run_ranks(ranks, finished, model, tmp_path / "out", tp, given)
    assert all(r == records[0] for r in records)
    record = records[0]
    best, losses, held_out = reference(model, which)
    assert record["losses"] == pytest.approx(losses, rel=1e-4)
    assert [loss for _, loss in record["held_out"]] == pytest.approx(held_out, rel=1e-3)
    assert record["kl_after"] == min(loss for _, loss in record["held_out"]) < record["kl_before"]
    assert record["blocks"] == blocks_to_finish(make_plan(model)) == TOUCHED
    assert record["kept"]
    base = planned_weights(CheckpointReader(model), make_plan(model))
    for block in range(LAYERS):
        got = trained_block([tmp_path / "out"], block)
        if block not in TOUCHED:
            assert got is None
            continue
        assert got is not None
        assert set(got) == set(best[block])
        for name, tensor in best[block].items():
            # Adam divides by the size of the gradient: where that is tiny its sign may differ, for a step of
            # at most RATE.
            off = (got[name].double() - tensor).abs() >= 1e-4
            assert int(off.sum()) <= max(1, 0.02 * off.numel()), (block, name)
            moved = which == "blocks" or "norm" in name
            assert torch.equal(got[name], base(block)[name]) != moved, (block, name)
    assert not (tmp_path / "out" / "unfinished").exists()


@pytest.mark.parametrize("stage", [1, 2])
def test_bf16(model: Path, tmp_path: Path, stage: int) -> None:
    given = settings(tmp_path, stage=stage, dtype="bf16")
    record = run_ranks(2, finished, model, tmp_path / "out", 2, given)[0]
    assert record["losses"] == pytest.approx(reference(model, "blocks")[1], rel=0.1)
    assert record["kept"]


def test_a_pass_that_does_not_help_changes_nothing(model: Path, tmp_path: Path) -> None:
    given = settings(tmp_path)
    engine = dataclasses.replace(given.engine, learning_rate=50.0, gradient_clipping=1e9)
    record = run_ranks(1, finished, model, tmp_path / "out", 1, dataclasses.replace(given, engine=engine))[0]
    assert not record["kept"]
    assert record["kl_after"] == record["kl_before"]
    assert trained_block([tmp_path / "out"], 1) is None


class Interrupted(Exception):
    """In place of a kill, where the process must go on to answer."""


def interrupted(model: Path, out: Path, tp: int, given: FinishSettings, at: int) -> int:
    """A pass that saves after every step and stops in step ``at``; the steps that were made."""
    step, pauses, made = TrainingLoop._step, (checkpoints._SAVE_EVERY, checkpoints._COST), 0

    def counted(self: TrainingLoop, number: int, batches: list[Tensor]) -> None:
        nonlocal made
        if number == at:
            raise Interrupted
        made += 1
        step(self, number, batches)

    TrainingLoop._step = counted  # type: ignore[method-assign]
    checkpoints._SAVE_EVERY, checkpoints._COST = -1.0, -1.0
    try:
        finished(model, out, tp, given)
    except Interrupted:
        pass
    finally:
        TrainingLoop._step = step  # type: ignore[method-assign]
        checkpoints._SAVE_EVERY, checkpoints._COST = pauses
    return made


def blocks_of(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in out.glob("block_*")}


@pytest.mark.parametrize(
    ("ranks", "tp", "stage", "dtype"),
    [(1, 1, 0, "fp32"), (2, 2, 1, "fp32"), (2, 1, 3, "fp32"), (2, 2, 1, "bf16"), (4, 2, 2, "bf16")],
)
def test_an_interrupted_pass_ends_with_the_same_bytes(
    model: Path, tmp_path: Path, ranks: int, tp: int, stage: int, dtype: str
) -> None:
    given = settings(tmp_path, ranks // tp, 1, stage, dtype)
    # With a rate that changes from step to step.
    zero = {"stage3_param_persistence_threshold": 0}
    Path(str(given.engine.config_file)).write_text(json.dumps({"zero_optimization": zero}))
    whole = run_ranks(ranks, finished, model, tmp_path / "whole", tp, given)[0]
    out = tmp_path / "out"
    assert run_ranks(ranks, interrupted, model, out, tp, given, 4) == [3] * ranks
    assert [p.name for p in (out / "unfinished").glob("step_*")] == ["step_00000003"]
    assert trained_block([out], 1) is None
    assert run_ranks(ranks, interrupted, model, out, tp, given, 6) == [2] * ranks
    record = run_ranks(ranks, finished, model, out, tp, given)[0]
    assert json.dumps(record) == json.dumps(whole)
    assert blocks_of(out) == blocks_of(tmp_path / "whole")
    assert len(blocks_of(out)) == len(TOUCHED)
    assert not (out / "unfinished").exists()


def test_a_checkpoint_of_other_ranks_is_not_continued(model: Path, tmp_path: Path) -> None:
    given = settings(tmp_path)
    whole = run_ranks(1, finished, model, tmp_path / "whole", 1, given)[0]
    run_ranks(2, interrupted, model, tmp_path / "out", 2, given, 4)
    assert run_ranks(1, interrupted, model, tmp_path / "out", 1, given, 6) == [5]
    assert run_ranks(1, finished, model, tmp_path / "out", 1, given)[0] == whole


def test_a_finished_pass_is_not_made_again(model: Path, tmp_path: Path) -> None:
    given = settings(tmp_path)
    first = run_ranks(1, finished, model, tmp_path / "out", 1, given)[0]
    assert run_ranks(1, interrupted, model, tmp_path / "out", 1, given, 1) == [0]
    assert run_ranks(1, finished, model, tmp_path / "out", 1, given)[0] == first


def trained(model: Path, out: Path) -> tuple[list[dict[str, Any]], Any, list[Tensor]]:
    """Distillation and finishing pass as the commands run them; records, and one final tensor of every block."""
    runtime = initialize(1)
    reader, plan, tokens = CheckpointReader(model), make_plan(model), make_tokens()
    options = DistillOptions(
        model="", plan="", out="", epochs=3, finish="blocks", finish_tokens=96, learning_rate=RATE
    )
    text = TrainingText(tokens, tokens)
    stores = training_stores(options, plan, text, out, runtime)
    units, last = run_training(
        reader, runtime, plan, text, options, stores, Tracker("none", out), seconds=600.0
    )
    weights = final_weights(reader, plan, out / "distill")
    return units, last, [weights(i)["mlp.down_proj.weight"] for i in range(LAYERS)]


def test_after_distillation(model: Path, tmp_path: Path) -> None:
    units, last, final = run_ranks(1, trained, model, tmp_path)[0]
    assert [u["blocks"] for u in units] == [TOUCHED]
    assert units[0]["kept"]
    assert last["kept"]
    # 96 tokens are two steps of four pieces of twelve.
    assert len(last["losses"]) == 2
    base = planned_weights(CheckpointReader(model), make_plan(model))
    for block, tensor in enumerate(final):
        distilled, finished = (trained_block([tmp_path / name], block) for name in ("distill", "finish"))
        if block not in TOUCHED:
            assert torch.equal(tensor, base(block)["mlp.down_proj.weight"])
            continue
        assert distilled is not None
        assert finished is not None
        assert torch.equal(tensor, finished["mlp.down_proj.weight"])
        # It went on from the distilled weights: two steps away from them at most.
        moved = (tensor - distilled["mlp.down_proj.weight"]).abs().max()
        assert 0 < moved < 2.1e-4
        assert (tensor - base(block)["mlp.down_proj.weight"]).abs().max() > 2.1e-4


def test_the_order_repeats(model: Path) -> None:
    # What the comparisons above rest on: every step has each of the four sequences once.
    order = example_order(4, 4 * STEPS, SEED * 1_000_003 + LAYERS)
    assert all(sorted(step.tolist()) == [0, 1, 2, 3] for step in order.split(4))
