"""Good command lines, models to damage, and what an error must look like: helpers of ``test_bad_input``."""

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


def write_plan(model: Path, path: Path, **changes: Any) -> Path:
    """A plan that drops both attention points of ``model`` and asks for everything; ``changes`` go into its JSON."""
    plan = SPDPlan.dense(CheckpointReader(model).base_model(), BRANCHES).with_drops([0, 2])
    plan = plan.with_block(0, tier="ESB", recovery="hg+b2b").with_block(1, tier="SB", recovery="b2b")
    path.write_text(json.dumps(plan.to_dict() | changes))
    return path


def arguments(name: str, world: Path, out: Path) -> list[object]:
    """A good command line of every command that writes to ``out``; options given after it win."""
    model, plan = ["--model", world / "model"], ["--plan", world / "plan.json"]
    data = ["--data", world / "text", "--sequences", 3, "--seq-length", 8]
    branches, training = (
        ["--branches", BRANCHES],
        ["--epochs", 1, "--micro-batch-size", 1, "--tracking", "none"],
    )
    return {
        "prepare": ["prepare", *model, "--out", out / "out"],
        "sensitivity": ["sensitivity", *model, *branches, *data, "--out", out / "out.json"],
        "plan": ["plan", *model, *branches, "--sensitivity", world / "s.json", "--out", out / "out.json"],
        "group": ["group", *model, *plan, *data, "--out", out / "out.json"],
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
