"""Trained weights on disk, units and finished blocks: safetensors files and JSON records, written whole or not at
all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from megatron_spd.checkpoint.safetensors_io import read_header, read_tensor
from megatron_spd.errors import UserError
from megatron_spd.files import write_atomic, write_text_atomic
from megatron_spd.plan import SPDPlan
from megatron_spd.runtime.distributed import Runtime


def plan_mark(plan: SPDPlan) -> str:
    """A hash of the function that a plan makes of its model: weights distilled for one mark are of no use to
    another. Provenance, tiers and recoveries do not enter."""
    facts = {k: v for k, v in plan.to_dict().items() if k != "provenance"}
    facts["blocks"] = [{k: v for k, v in b.items() if k not in ("tier", "recovery")} for b in facts["blocks"]]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def check_distilled_for(plan: SPDPlan, folder: Path) -> None:
    """Raise UserError unless ``folder`` is a :class:`UnitStore`'s and its units were distilled for ``plan``."""
    stamp = folder / "identity"
    if not stamp.is_file():
        raise UserError(f"{folder} is not the output folder of `megatron-spd distill`; give that folder")
    if not stamp.read_text(encoding="utf-8").startswith(plan_mark(plan)):
        raise UserError(
            f"the units in {folder} were distilled for another plan; give the plan they were made with"
        )


def claim_folder(folder: Path, identity: str, runtime: Runtime) -> None:
    """Make ``folder`` that of the training ``identity``. Raises UserError on every rank if it holds another
    one's."""
    problem = runtime.from_main(_claim(folder, identity) if runtime.is_main else None)
    if problem:
        raise UserError(problem)


def _claim(folder: Path, identity: str) -> str | None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        return f"{folder} cannot be made, a file is in its place; give another output folder"
    stamp = folder / "identity"
    if stamp.exists() and stamp.read_text() != identity:
        return (
            f"{folder} holds the units of another distillation or calibration (other plan, data or settings); "
            "give another output folder, or remove it"
        )
    write_text_atomic(stamp, identity)
    return None


class UnitStore:
    """The folder of finished units of one distillation. ``identity``: hash of everything that decides its weights.

    Raises UserError if the folder holds another distillation.
    """

    def __init__(self, folder: Path, identity: str, runtime: Runtime) -> None:
        self.folder = folder
        claim_folder(folder, identity, runtime)

    def _path(self, unit: range, suffix: str) -> Path:
        return self.folder / f"unit_{unit.start:04d}_{unit.stop - 1:04d}.{suffix}"

    def has(self, unit: range) -> bool:
        """Whether ``unit`` is finished."""
        return self._path(unit, "json").is_file()

    def record(self, unit: range) -> dict[str, Any]:
        """What :func:`megatron_spd.distill.recipe.distill` noted of a finished unit."""
        return json.loads(self._path(unit, "json").read_text(encoding="utf-8"))

    def block(self, unit: range, block: int) -> dict[str, Tensor]:
        """Block ``block``'s full tensors from a finished unit that was kept."""
        return _read_block(self._path(unit, "safetensors"), block)

    def save(
        self,
        unit: range,
        blocks: Mapping[int, Mapping[str, Tensor]] | None,
        record: dict[str, Any],
        runtime: Runtime,
    ) -> None:
        """Keep a unit: ``blocks`` full tensors by block number (None: the initial weights stay), then its
        record. The record is written last, so that its presence means that the weights are whole."""
        if not runtime.is_main:
            return
        if blocks is not None:
            flat = {
                f"{block}:{name}": t.contiguous()
                for block, tensors in blocks.items()
                for name, t in tensors.items()
            }
            write_atomic(self._path(unit, "safetensors"), lambda temporary: save_file(flat, temporary))
        write_text_atomic(self._path(unit, "json"), json.dumps(record))


class FinishStore:
    """The folder of a finishing pass: a file for every block that it trained, and ``record.json``, written last,
    whose presence means that they are whole. Raises UserError if the folder holds another training."""

    def __init__(self, folder: Path, identity: str, runtime: Runtime) -> None:
        self.folder = folder
        claim_folder(folder, identity, runtime)

    @property
    def unfinished(self) -> Path:
        """Where checkpoints of a pass that is not over are kept."""
        return self.folder / "unfinished"

    def record(self) -> dict[str, Any] | None:
        """What :func:`megatron_spd.distill.finish.finish` noted, if it is over."""
        path = self.folder / _FINISHED
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def save_block(self, block: int, tensors: Mapping[str, Tensor], runtime: Runtime) -> None:
        """Keep the full tensors of one block (main rank only)."""
        if runtime.is_main:
            flat = {f"{block}:{name}": t.contiguous() for name, t in tensors.items()}
            write_atomic(_finished_path(self.folder, block), lambda temporary: save_file(flat, temporary))

    def save_record(self, record: dict[str, Any], runtime: Runtime) -> None:
        """Make what was saved count."""
        if runtime.is_main:
            write_text_atomic(self.folder / _FINISHED, json.dumps(record))


_FINISHED = "record.json"


def _finished_path(folder: Path, block: int) -> Path:
    return folder / f"block_{block:04d}.safetensors"


def trained_block(folders: Iterable[Path], block: int) -> dict[str, Tensor] | None:
    """Block ``block``'s full tensors from the first of ``folders`` that has trained it, else None.

    ``folders``: of finishing passes and of distillations, the later training first: ``[run / "finish", run /
    "distill"]``. A folder that does not exist has trained nothing.
    """
    for folder in folders:
        finished = _finished_path(folder, block)
        if finished.is_file() and (folder / _FINISHED).is_file():
            return _read_block(finished, block)
        found = distilled_block(folder, block)
        if found is not None:
            return found
    return None


def distilled_block(folder: Path, block: int) -> dict[str, Tensor] | None:
    """Block ``block``'s full tensors if a finished unit under ``folder`` has trained it, else None."""
    for path in sorted(folder.glob("unit_*_*.safetensors")):
        first, last = (int(part) for part in path.stem.split("_")[1:])
        if first <= block <= last and path.with_suffix(".json").is_file():
            return _read_block(path, block)
    return None


def _read_block(path: Path, block: int) -> dict[str, Tensor]:
    prefix = f"{block}:"
    entries = read_header(path)
    return {n.removeprefix(prefix): read_tensor(e) for n, e in entries.items() if n.startswith(prefix)}
