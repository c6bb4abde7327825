"""Good command lines, mistakes, models to damage, and what an error must look like: helpers of ``test_bad_input``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_spd.checkpoint.hf import CheckpointReader
from megatron_spd.plan import SPDPlan
from tests.command_line import ERROR, Outcome

BRANCHES = 2

#: Prepares something wrong in the second folder, given the first (the good things); the options that show it.
Mistake = Callable[[Path, Path], list[object]]


def write_plan(model: Path, path: Path, **changes: Any) -> Path:
    """A plan that drops both attention points of ``model`` and asks for everything; ``changes`` go into its JSON."""
    plan = SPDPlan.dense(CheckpointReader(model).base_model(), BRANCHES).with_drops([0, 2])
    plan = plan.with_block(0, tier="ESB", recovery="hg+b2b").with_block(1, tier="SB", recovery="b2b")
    path.write_text(json.dumps(plan.to_dict() | changes))
    return path


def arguments(name: str, world: Path, out: Path) -> list[object]:
    """A good command line of every command that writes to ``out``; options given after it win. `calibrate`: that of
    `group` with calibration."""
    model, plan = ["--model", world / "model"], ["--plan", world / "plan.json"]
    data = ["--data", world / "text", "--sequences", 3, "--seq-length", 8]
    branches, training = (
        ["--branches", BRANCHES],
        ["--epochs", 1, "--micro-batch-size", 1, "--tracking", "none"],
    )
    return {
        "prepare": ["prepare", *model, "--out", out / "out"],
        "sensitivity": ["sensitivity", *model, *branches, *data, "--out", out / "out.json"],
        "plan": [
            *["plan", *model, *branches, *data],
            *["--sensitivity", world / "s.json", "--out", out / "out.json"],
        ],
        "group": ["group", *model, *plan, *data, "--out", out / "out.json"],
        "calibrate": ["group", *model, *plan, *data, "--calibrated", out / "out", "--out", out / "out.json"],
        "distill": ["distill", *model, *plan, *data, *training, "--out", out / "out"],
        "export": ["export", *model, *plan, "--out", out / "out"],
        "evaluate": ["evaluate", *model, *data],
        "generate": ["generate", *model, "--prompt", "Every rank", "--max-new-tokens", 2],
        "report": ["report", "--run", world / "run"],
        "run": ["run", *model, *branches, *data, *training, "--out", out / "out", "--drop-ratio", 1, *_SMALL],
    }[name]


_SMALL = ["--eval-sequences", 2, "--distill-sequences", 3]


def assert_one_line(outcome: Outcome, words: str) -> None:
    assert outcome.code == 2
    assert outcome.out == ""
    (line,) = [e for e in outcome.err.splitlines() if e.startswith(ERROR)]
    assert "Traceback" not in outcome.err
    assert outcome.err.endswith(line + "\n")
    assert words in line


def damaged(world: Path, out: Path, edit: Callable[[Path], object]) -> list[object]:
    """The model, copied and edited, as ``--model``."""
    shutil.copytree(world / "model", out / "model")
    edit(out / "model")
    return ["--model", out / "model"]


def tensors(edit: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    """An edit of the tensors of a model folder."""

    def apply(folder: Path) -> None:
        held = load_file(folder / "model.safetensors")
        edit(held)
        save_file(held, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


# ---- mistakes -----------------------------------------------------------------------------------------------------


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def config(**changes: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return apply


def model(edit: Callable[[Path], object]) -> Mistake:
    return lambda world, out: damaged(world, out, edit)


def text(content: bytes) -> Mistake:
    def write(world: Path, out: Path) -> list[object]:
        (out / "text").write_bytes(content)
        return ["--data", out / "text"]

    return write


def option(*values: object) -> Mistake:
    return lambda world, out: list(values)


def of_world(flag: str, name: str) -> Mistake:
    """An option that names something that the world has."""
    return lambda world, out: [flag, world / name]


def new_file(flag: str, content: str, name: str = "given.json") -> Mistake:
    def write(world: Path, out: Path) -> list[object]:
        (out / name).write_text(content)
        return [flag, out / name]

    return write


def occupied(name: str = "out") -> Mistake:
    """Something of the user's lies where the output is to go."""

    def write(world: Path, out: Path) -> list[object]:
        (out / name).mkdir()
        (out / name / "thesis.txt").write_text("years of work")
        return []

    return write


def plan_of_version(version: int) -> Mistake:
    return lambda world, out: ["--plan", write_plan(world / "model", out / "plan.json", version=version)]


def edited_sensitivity(**changes: Any) -> Mistake:
    def write(world: Path, out: Path) -> list[object]:
        held = json.loads((world / "s.json").read_text())
        (out / "s.json").write_text(json.dumps(held | changes))
        return ["--sensitivity", out / "s.json"]

    return write
