"""The fine-tuning examples on small random models and the embedded text: what they train is what they export."""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megatron_spd.calibration.text import read_text, token_batches
from megatron_spd.checkpoint.hf import CheckpointReader
from megatron_spd.errors import UserError
from megatron_spd.evaluate.generate import load_for_generation
from megatron_spd.finetune.checkpoint import FinetuneCheckpoints, Progress
from megatron_spd.plan import SPDPlan
from tests.models import make_export, make_llama
from tests.ranks import run_ranks

EXAMPLES = Path(__file__).parents[2] / "examples"
#: Seconds: ranks that start on a busy machine take a while.
LIMIT = 200
SIZES = {
    "sequences": 8,
    "seq-length": 24,
    "eval-sequences": 4,
    "steps": 6,
    "batch-size": 4,
    "learning-rate": 0.02,
}
SMALL = [part for name, value in SIZES.items() for part in (f"--{name}", str(value))]
DROPPED = (0, 2, 3, 4)


def example(name: str, arguments: list[str]) -> dict[str, Any] | str:
    """The result of an example on this rank, or the line of its UserError."""
    try:
        return runpy.run_path(str(EXAMPLES / name / "finetune.py"))["finetune"](arguments)
    except UserError as error:
        return str(error)


def export_loss(folder: Path) -> float:
    """The held-out loss of an export by transformers."""
    tokenizer = CheckpointReader(folder).tokenizer()
    tokens = token_batches(tokenizer, read_text(None), 4, 25, skip=8)
    with torch.no_grad():
        logits = load_for_generation(folder)(tokens[:, :-1]).logits
    return float(F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten()))


CASES = {
    "megatron, tp2 pp2": (
        "finetune_megatron",
        "--tensor-parallel 2 --pipeline-parallel 2 --first-stage 1 --recompute",
    ),
    "megatron, tp2 dp2, sequence parallel, distributed optimizer": (
        "finetune_megatron",
        "--tensor-parallel 2 --sequence-parallel --distributed-optimizer --micro-batch-size 2",
    ),
    "deepspeed, tp2 dp2, zero 2, sequence parallel": (
        "finetune_deepspeed",
        "--tensor-parallel 2 --zero-stage 2 --sequence-parallel",
    ),
}


@pytest.mark.parametrize(("name", "form"), CASES.values(), ids=CASES.keys())
def test_what_is_trained_is_exported(tmp_path: Path, name: str, form: str) -> None:
    base = make_llama(tmp_path / "m")
    plan = SPDPlan.dense(CheckpointReader(base).base_model(), 2).with_drops(DROPPED)
    plan.save(tmp_path / "plan.json")
    given = ["--model", str(base), "--plan", str(tmp_path / "plan.json"), "--out", str(tmp_path / "out")]
    result = run_ranks(4, example, name, [*given, *SMALL, *form.split()], timeout=LIMIT)[0]
    assert len(result["losses"]) == 6
    assert result["loss_after"] < result["loss_before"] - 0.1
    assert export_loss(tmp_path / "out") == pytest.approx(result["loss_after"], rel=1e-4)
    exported = CheckpointReader(tmp_path / "out").plan
    assert exported is not None
    assert exported.dropped == list(DROPPED)
    trained = exported.provenance["finetune"]
    assert (trained["steps"], trained["loss_after"]) == (6, result["loss_after"])
    # Embedding and final norm are trained too.
    before, after = CheckpointReader(base), CheckpointReader(tmp_path / "out")
    for tensor in ("model.embed_tokens.weight", "model.norm.weight"):
        assert (before.get(tensor) - after.get(tensor)).norm() > 0


@pytest.mark.parametrize(
    ("form", "tied", "dropped"),
    [
        ("--zero-stage 1 --recompute", False, DROPPED),
        ("--zero-stage 2 --sequence-parallel", False, DROPPED),
        # The last block is a stock one.
        ("--zero-stage 3", True, (0, 2)),
    ],
)
def test_deepspeed_steps_are_those_of_one_process(
    tmp_path: Path, form: str, tied: bool, dropped: tuple[int, ...]
) -> None:
    base = make_llama(tmp_path / "m", biases=True, tied=tied)
    folder = make_export(base, tmp_path / "x", 2, dropped, [(0, "mlp")], norms=[(1, "mlp")])
    # With a large epsilon the rounding of a small gradient does not decide which way Adam goes.
    config = tmp_path / "ds_config.json"
    # ZeRO-3 would leave parameters as small as these whole on every rank.
    zero = {"stage3_param_persistence_threshold": 0}
    config.write_text(json.dumps({"optimizer": {"params": {"eps": 0.1}}, "zero_optimization": zero}))
    given = ["--model", str(folder), "--deepspeed_config", str(config), *SMALL]
    results = {}
    for ranks, options in ((1, ""), (4, f"--tensor-parallel 2 {form}")):
        out = ["--out", str(tmp_path / str(ranks))]
        arguments = [*given, *out, *options.split()]
        results[ranks] = run_ranks(ranks, example, "finetune_deepspeed", arguments, timeout=LIMIT)[0]
    assert results[4]["losses"] == pytest.approx(results[1]["losses"], rel=1e-5)
    before, wanted, got = (CheckpointReader(p) for p in (folder, tmp_path / "1", tmp_path / "4"))
    for name in before.names():
        tensor = wanted.get(name)
        assert (tensor - before.get(name)).norm() > 1e-4 * tensor.norm(), f"{name} has not been trained"
        assert (got.get(name) - tensor).norm() < 1e-5 * tensor.norm(), name


class Interrupted(Exception):
    """In place of a kill, where the process must go on to answer."""


def interrupted(arguments: list[str], at: int) -> bool:
    """Fine-tuning in DeepSpeed that stops when it would save after step ``at``; whether it got there."""
    save = FinetuneCheckpoints.save_if_due

    def saved(self: FinetuneCheckpoints, engine: Any, progress: Progress) -> None:
        if len(progress.losses) == at:
            raise Interrupted
        save(self, engine, progress)

    FinetuneCheckpoints.save_if_due = saved  # type: ignore[method-assign]
    try:
        example("finetune_deepspeed", arguments)
    except Interrupted:
        return True
    finally:
        FinetuneCheckpoints.save_if_due = save  # type: ignore[method-assign]
    return False


def make_universal(checkpoint: Path) -> None:
    from deepspeed.checkpoint import ds_to_universal

    settings = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
    folders = {"input_folder": str(checkpoint), "output_folder": f"{checkpoint}_universal"}
    ds_to_universal.main(SimpleNamespace(**folders, **settings, inject_missing_state=False))


def given_for_resuming(folder: Path) -> list[str]:
    base = make_llama(folder / "m", biases=True, tied=False, vocabulary=325)
    export = make_export(base, folder / "x", 2, DROPPED, [(0, "mlp")], norms=[(1, "mlp")])
    config = folder / "ds_config.json"
    zero = {"stage3_param_persistence_threshold": 0}
    config.write_text(json.dumps({"optimizer": {"params": {"eps": 0.1}}, "zero_optimization": zero}))
    return ["--model", str(export), "--deepspeed_config", str(config), *SMALL, "--save-every", "2"]


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


@pytest.mark.parametrize(
    ("ranks", "form"), [(4, "--tensor-parallel 2"), (2, "--tensor-parallel 1 --zero-stage 3")]
)
def test_a_killed_run_goes_on(tmp_path: Path, ranks: int, form: str) -> None:
    given = [*given_for_resuming(tmp_path), *form.split()]

    def ways(name: str) -> list[str]:
        return ["--out", str(tmp_path / name), "--checkpoint", str(tmp_path / f"{name}_states")]

    def run(arguments: list[str], count: int = ranks) -> Any:
        return run_ranks(count, example, "finetune_deepspeed", arguments, timeout=LIMIT)[0]

    whole = run([*given, *ways("whole")])
    assert run_ranks(ranks, interrupted, [*given, *ways("out")], 5, timeout=LIMIT) == [True] * ranks
    states = tmp_path / "out_states"
    assert [p.name for p in states.glob("step_*")] == ["step_00000004"]
    assert not (tmp_path / "out").exists()
    shutil.copytree(states, tmp_path / "other_states")
    again = run([*given, *ways("out")])
    assert again | {"out": ""} == whole | {"out": ""}
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    # Neither another run nor other ranks go on from it.
    assert "with learning_rate = 0.02, this one has 0.5" in run(
        [*given, *ways("other"), "--learning-rate", "0.5"]
    )
    assert not (tmp_path / "other").exists()
    if ranks == 2:
        return
    # Two replicas of one rank, instead of two of two.
    alone = [*given, *ways("other"), "--tensor-parallel", "1"]
    assert "ds_to_universal --input_folder" in run(alone, 2)
    make_universal(tmp_path / "other_states" / "step_00000004")
    assert run(alone, 2)["losses"] == pytest.approx(whole["losses"], rel=1e-5)
    wanted, got = (CheckpointReader(tmp_path / name) for name in ("whole", "other"))
    for name in wanted.names():
        assert (got.get(name) - wanted.get(name)).norm() < 1e-5 * wanted.get(name).norm(), name


def test_an_export_is_trained_on(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "m", tied=False, biases=True)
    folder = make_export(base, tmp_path / "x", 2, DROPPED, [(0, "mlp")], norms=[(1, "mlp")])
    given = ["--model", str(folder), "--out", str(tmp_path / "out"), *SMALL]
    results = run_ranks(2, example, "finetune_deepspeed", given, timeout=LIMIT)
    assert results[0]["losses"] == results[1]["losses"]
    assert export_loss(tmp_path / "out") == pytest.approx(results[0]["loss_after"], rel=1e-4)
    shift = "model.layers.0.mlp.spd_shift"
    assert (CheckpointReader(folder).get(shift) - CheckpointReader(tmp_path / "out").get(shift)).norm() > 0


BAD = {
    "no plan": ([], "is a plain model; give its --plan"),
    "replicas": (["--plan", "PLAN", "--tensor-parallel", "1", "--batch-size", "3"], "does not divide over 2"),
    "held-out": (["--plan", "PLAN", "--tensor-parallel", "1", "--eval-sequences", "3"], "--eval-sequences 3"),
    "sequence parallel": (["--plan", "PLAN", "--sequence-parallel", "--seq-length", "23"], "of 23 tokens do"),
    "stages": (["--plan", "PLAN", "--pipeline-parallel", "3"], "3 pipeline stages do not divide the 2"),
    "in use": (["--plan", "PLAN", "--out", "USED"], "is not empty; give another --out"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input(tmp_path: Path, arguments: list[str], message: str) -> None:
    base = make_llama(tmp_path / "m")
    plan = SPDPlan.dense(CheckpointReader(base).base_model(), 2).with_drops(DROPPED)
    plan.save(tmp_path / "plan.json")
    known = {"PLAN": str(tmp_path / "plan.json"), "USED": str(base)}
    given = [
        "--model",
        str(base),
        "--out",
        str(tmp_path / "out"),
        *SMALL,
        *(known.get(a, a) for a in arguments),
    ]
    for told in run_ranks(2, example, "finetune_megatron", given, timeout=LIMIT):
        assert isinstance(told, str)
        assert message in told
    assert not (tmp_path / "out").exists()
