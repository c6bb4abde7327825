"""Distilled units on disk: one safetensors file and one JSON record each, written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_spd.errors import UserError
from megatron_spd.runtime.distributed import Runtime


class UnitStore:
    """The folder of finished units of one distillation. ``identity``: hash of everything that decides its weights.

    Raises UserError if the folder holds another distillation.
    """

    def __init__(self, folder: Path, identity: str, runtime: Runtime) -> None:
        self.folder = folder
        problem = None
        if runtime.is_main:
            problem = self._claim(identity)
        problem = runtime.from_main(problem)
        if problem:
            raise UserError(problem)

    def _claim(self, identity: str) -> str | None:
        self.folder.mkdir(parents=True, exist_ok=True)
        stamp = self.folder / "identity"
        if stamp.exists() and stamp.read_text() != identity:
            return (
                f"{self.folder} holds the units of another distillation (other plan, data or settings); "
                "give another output folder, or remove it"
            )
        _write_text(stamp, identity)
        return None

    def _path(self, unit: range, suffix: str) -> Path:
        return self.folder / f"unit_{unit.start:04d}_{unit.stop - 1:04d}.{suffix}"

    def has(self, unit: range) -> bool:
        """Whether ``unit`` is finished."""
        return self._path(unit, "json").is_file()

    def record(self, unit: range) -> dict[str, Any]:
        """What :func:`megatron_spd.distill.recipe.distill` noted of a finished unit."""
        return json.loads(self._path(unit, "json").read_text(encoding="utf-8"))

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
            path = self._path(unit, "safetensors")
            temporary = path.with_name(path.name + ".tmp")
            save_file(flat, temporary)
            os.replace(temporary, path)
        _write_text(self._path(unit, "json"), json.dumps(record))


def distilled_block(folder: Path, block: int) -> dict[str, Tensor] | None:
    """Block ``block``'s full tensors if a finished unit under ``folder`` has trained it, else None."""
    for path in sorted(folder.glob("unit_*_*.safetensors")):
        first, last = (int(part) for part in path.stem.split("_")[1:])
        if first <= block <= last and path.with_suffix(".json").is_file():
            with safe_open(path, "pt") as file:
                prefix = f"{block}:"
                names = [n for n in file.keys() if n.startswith(prefix)]  # noqa: SIM118 (not a dict)
                return {n.removeprefix(prefix): file.get_tensor(n) for n in names}
    return None


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
