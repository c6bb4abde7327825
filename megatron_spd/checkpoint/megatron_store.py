"""Where Megatron-core keeps parameters: what every reader of its checkpoints offers, and finding the checkpoint."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Protocol

from torch import Tensor

from megatron_spd.errors import CheckpointError

#: Megatron-LM writes here which of its `iter_...` folders is the newest, or the word "release".
TRACKER = "latest_checkpointed_iteration.txt"
#: Names the format of a distributed checkpoint.
DIST_CONFIG = "metadata.json"
_LEGACY_RANKS = "mp_rank_*"


class ParameterStore(Protocol):
    """A model's parameters by canonical name (``megatron_names.py``), cut for ``ranks`` tensor-parallel ranks."""

    @property
    def folder(self) -> Path:
        """Where they lie."""

    @property
    def ranks(self) -> int:
        """Into how many parts split parameters are cut."""

    def names(self) -> Collection[str]:
        """The names of all of them."""

    def like(self, name: str, rank: int) -> Tensor:
        """A tensor without data of the shape and dtype of rank ``rank``'s part. Raises KeyError."""

    def load(self, name: str, rank: int) -> Tensor:
        """Rank ``rank``'s part of a parameter. Raises KeyError, and CheckpointError where it cannot be read."""


def is_dist(folder: Path) -> bool:
    """Whether ``folder`` itself holds a distributed checkpoint."""
    return (folder / DIST_CONFIG).is_file() or (folder / ".metadata").is_file()


def is_legacy(folder: Path) -> bool:
    """Whether ``folder`` itself holds a checkpoint of one file for each rank."""
    return any(folder.glob(_LEGACY_RANKS))


def find_checkpoint(folder: Path) -> Path:
    """The folder with the weights: ``folder`` itself, or the one in it that Megatron-LM's tracker file names.

    Raises CheckpointError where neither holds a checkpoint.
    """
    if not folder.is_dir():
        raise CheckpointError(f"no folder {folder}; give the folder of a Megatron checkpoint")
    if is_dist(folder) or is_legacy(folder):
        return folder
    tracker = folder / TRACKER
    if not tracker.is_file():
        raise CheckpointError(
            f"{folder} is no Megatron checkpoint: it has neither {TRACKER}, nor {DIST_CONFIG}, nor {_LEGACY_RANKS}"
        )
    found = tracker.read_text(encoding="utf-8", errors="replace").strip()
    if found != "release" and not found.isdecimal():
        raise CheckpointError(
            f"{tracker} holds {found[:40]!r}, expected a number or 'release'; write it again"
        )
    inner = folder / (found if found == "release" else f"iter_{int(found):07d}")
    if not (is_dist(inner) or is_legacy(inner)):
        raise CheckpointError(f"{tracker} names {inner.name}, in which there is no checkpoint; copy it there")
    return inner
