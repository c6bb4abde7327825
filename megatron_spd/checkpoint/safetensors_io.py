"""Safetensors files: their headers, checked before anything is read, and writing a model in shards as it streams."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_spd.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

#: Bytes of one file of a model that is written in shards.
MAX_SHARD_BYTES = 5 * 1024**3

#: The dtypes whose tensors can be model weights here; others are quantised formats.
TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: ``file`` [``start``, ``end``) in bytes from the start of the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(file: Path) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file by name.

    The format (8 bytes of header length, a JSON header, the tensors end to end) is checked against the size of the
    file. Raises CheckpointError for a file that is truncated or no safetensors file.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or 8 + length > size:
            raise CheckpointError(
                f"{file} is truncated or no safetensors file: it has {size} bytes, its header alone "
                f"needs {8 + length if len(prefix) == 8 else 8}; copy or download it again"
            )
        raw = stream.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        entries = {name: _entry(file, 8 + length, fields) for name, fields in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{file} has no valid safetensors header; copy or download it again") from None
    needed = max((entry.end for entry in entries.values()), default=8 + length)
    if needed != size:
        raise CheckpointError(
            f"{file} is truncated or damaged: it has {size} bytes, its header describes {needed}; "
            "copy or download it again"
        )
    return entries


def _entry(file: Path, data_start: int, fields: dict) -> TensorEntry:
    start, end = (data_start + int(offset) for offset in fields["data_offsets"])
    entry = TensorEntry(file, str(fields["dtype"]), tuple(int(n) for n in fields["shape"]), start, end)
    dtype = TORCH_DTYPES.get(entry.dtype)
    if dtype is not None and end - start != dtype.itemsize * math.prod(entry.shape):
        raise ValueError(f"{entry} has the wrong number of bytes")
    return entry


class ShardWriter:
    """Writes a model's tensors to ``folder`` in the order in which they come.

    At most one shard (``max_shard_bytes``) is held in memory. :meth:`close` gives the files their Hugging Face names:
    one ``model.safetensors``, or numbered shards with ``model.safetensors.index.json``. The folder is expected to be
    a temporary one (see :func:`megatron_spd.checkpoint.folders.atomic_folder`): nothing is cleaned up on an error.
    """

    def __init__(self, folder: Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        self.folder = folder
        self.max_shard_bytes = max_shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._total_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Add one tensor (any device, any layout); it is kept as it is now, later changes to it are not seen."""
        stored = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        if self._pending and self._pending_bytes + stored.nbytes > self.max_shard_bytes:
            self._flush()
        self._pending[name] = stored
        self._pending_bytes += stored.nbytes
        self._total_bytes += stored.nbytes

    def _flush(self) -> None:
        save_file(self._pending, self._part(len(self._shards)), metadata={"format": "pt"})
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def _part(self, shard: int) -> Path:
        return self.folder / f"part-{shard}.safetensors"

    def close(self) -> None:
        """Write what is left and name the files."""
        self._flush()
        count = len(self._shards)
        for shard in range(count):
            # safetensors makes files that only their owner can read.
            self._part(shard).chmod(0o644)
        if count == 1:
            os.replace(self._part(0), self.folder / SINGLE_NAME)
            return
        weight_map: dict[str, str] = {}
        for shard, names in enumerate(self._shards):
            file = f"model-{shard + 1:05d}-of-{count:05d}.safetensors"
            os.replace(self._part(shard), self.folder / file)
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
        (self.folder / INDEX_NAME).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
