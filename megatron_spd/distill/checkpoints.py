"""Checkpoints of a training that is not over: DeepSpeed's own, with the best state and the curves beside it."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from megatron_spd.distill.loop import TrainingLoop
from megatron_spd.files import write_text_atomic
from megatron_spd.runtime.distributed import Runtime

#: Least seconds between checkpoints, and how many times longer than writing one they are apart at least.
_SAVE_EVERY, _COST = 120.0, 30.0


class Checkpoints:
    """The last checkpoint of one training in ``folder``.

    Every checkpoint is a new folder; the file ``latest.json`` names the one that counts and is renamed into place when
    all ranks have written. Older ones are removed after that.
    """

    def __init__(self, folder: Path, runtime: Runtime) -> None:
        self.folder, self.runtime = folder, runtime
        self._saved, self._pause = time.monotonic(), _SAVE_EVERY

    def save_if_due(self, loop: TrainingLoop) -> None:
        """Save if the last checkpoint is old enough (by the main rank's clock) that saving takes a small share of the
        time."""
        due = time.monotonic()
        if self.runtime.from_main(due - self._saved > self._pause):
            self.save(loop)
            self._saved = time.monotonic()
            self._pause = max(_SAVE_EVERY, _COST * (self._saved - due))

    def save(self, loop: TrainingLoop) -> None:
        """Save the state of ``loop`` and its engine: a collective of all ranks."""
        tag = f"step_{len(loop.losses):08d}"
        loop.engine.save_checkpoint(
            str(self.folder), tag=tag, save_latest=False, exclude_frozen_parameters=True
        )
        if self.runtime.dp_rank == 0:
            tensors = {name: t.contiguous() for name, t in loop.best.tensors.items()}
            save_file(tensors, self._best(tag))
        self.runtime.barrier()
        if self.runtime.is_main:
            state = {
                "tag": tag,
                "ranks": self._ranks(),
                "losses": loop.losses,
                "held_out": loop.held_out,
                "best_step": loop.best.step,
                "best_loss": loop.best.loss,
            }
            write_text_atomic(self.folder / "latest.json", json.dumps(state))
            for old in self.folder.glob("step_*"):
                if old.name != tag:
                    shutil.rmtree(old)

    def load(self, loop: TrainingLoop) -> None:
        """Put the last checkpoint into ``loop`` and its fresh engine. Nothing happens if there is none, or if it is of
        another number of ranks, whose parts do not fit: the training then starts again."""
        state = self.runtime.from_main(self._state() if self.runtime.is_main else None)
        if state is None:
            return
        loop.engine.load_checkpoint(str(self.folder), tag=state["tag"], load_module_strict=False)
        loop.losses = state["losses"]
        loop.held_out = state["held_out"]
        loop.best.resume(state["best_step"], state["best_loss"], load_file(self._best(state["tag"])))

    def remove(self) -> None:
        """Remove everything, at the end of the training."""
        self.runtime.barrier()
        if self.runtime.is_main:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _state(self) -> dict[str, Any] | None:
        latest = self.folder / "latest.json"
        if not latest.is_file():
            return None
        state = json.loads(latest.read_text(encoding="utf-8"))
        return state if state["ranks"] == self._ranks() else None

    def _ranks(self) -> list[int]:
        return [self.runtime.tp_size, self.runtime.dp_size]

    def _best(self, tag: str) -> Path:
        return self.folder / tag / f"best_{self.runtime.tp_rank:02d}.safetensors"
