"""Checkpoints of a training that is not over: DeepSpeed's own, with what else the training needs beside them."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from megatron_spd.distill.loop import TrainingLoop
from megatron_spd.files import write_text_atomic
from megatron_spd.runtime.distributed import Runtime

#: Least seconds between checkpoints, and how many times longer than writing one they are apart at least.
_SAVE_EVERY, _COST = 120.0, 30.0


class EngineCheckpoints:
    """The last checkpoint of one DeepSpeed engine in ``folder``.

    Every checkpoint is a new folder; the file ``latest.json`` names the one that counts and is renamed into place when
    all ranks have written. Older ones are removed after that.
    """

    def __init__(self, folder: Path, runtime: Runtime) -> None:
        self.folder, self.runtime = folder, runtime
        #: M and the replicas, which a checkpoint must be of to fit.
        self.ranks = [runtime.tp_size, runtime.dp_size]

    def save(
        self, engine: Any, step: int, state: dict[str, Any], beside: Callable[[Path], None] | None = None
    ) -> None:
        """Save ``engine`` after ``step`` steps, with ``state`` (JSON): a collective of all ranks. ``beside`` may write
        further files into the checkpoint's folder, on every rank."""
        tag = f"step_{step:08d}"
        engine.save_checkpoint(str(self.folder), tag=tag, save_latest=False, exclude_frozen_parameters=True)
        if beside is not None:
            beside(self.folder / tag)
        self.runtime.barrier()
        if self.runtime.is_main:
            latest = {"tag": tag, "ranks": self.ranks, **state}
            write_text_atomic(self.folder / "latest.json", json.dumps(latest))
            for old in self.folder.glob("step_*"):
                if old.name != tag:
                    shutil.rmtree(old)

    def latest(self) -> dict[str, Any] | None:
        """What :meth:`save` was given as ``state`` last, with ``tag`` (the name of the folder) and ``ranks``, on every
        rank; None if there is no checkpoint."""
        path, state = self.folder / "latest.json", None
        if self.runtime.is_main and path.is_file():
            state = json.loads(path.read_text(encoding="utf-8"))
        return self.runtime.from_main(state)

    def load(self, engine: Any, tag: str) -> None:
        """Put the checkpoint ``tag`` into a fresh ``engine``."""
        engine.load_checkpoint(str(self.folder), tag=tag, load_module_strict=False)

    def remove(self) -> None:
        """Remove everything, at the end of the training."""
        self.runtime.barrier()
        if self.runtime.is_main:
            shutil.rmtree(self.folder, ignore_errors=True)


class Checkpoints:
    """The last checkpoint of one training loop in ``folder``, with its best state and its curves."""

    def __init__(self, folder: Path, runtime: Runtime) -> None:
        self.store, self.runtime = EngineCheckpoints(folder, runtime), runtime
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

        def best_state(folder: Path) -> None:
            if self.runtime.dp_rank == 0:
                tensors = {name: t.contiguous() for name, t in loop.best.tensors.items()}
                save_file(tensors, folder / self._best)

        state = {
            "losses": loop.losses,
            "held_out": loop.held_out,
            "best_step": loop.best.step,
            "best_loss": loop.best.loss,
        }
        self.store.save(loop.engine, len(loop.losses), state, best_state)

    def load(self, loop: TrainingLoop) -> None:
        """Put the last checkpoint into ``loop`` and its fresh engine. Nothing happens if there is none, or if it is of
        another number of ranks, whose parts do not fit: the training then starts again."""
        state = self.store.latest()
        if state is None or state["ranks"] != self.store.ranks:
            return
        self.store.load(loop.engine, state["tag"])
        loop.losses = state["losses"]
        loop.held_out = state["held_out"]
        best = load_file(self.store.folder / state["tag"] / self._best)
        loop.best.resume(state["best_step"], state["best_loss"], best)

    def remove(self) -> None:
        """Remove everything, at the end of the training."""
        self.store.remove()

    @property
    def _best(self) -> str:
        return f"best_{self.runtime.tp_rank:02d}.safetensors"
