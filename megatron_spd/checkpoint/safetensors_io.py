"""Safetensors files: their headers, checked before anything is read, and writing a model in shards as it streams."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_spd.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

#: Bytes of one file of a model that is written in shards.
MAX_SHARD_BYTES = 5 * 1024**3

#: The dtypes whose tensors can be model weights here; others are quantised formats.
TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}

#: What is kept free for the header of a file that is being written: more than a thousand tensors fit.
_HEADER_BYTES = 2**17
_METADATA = '{"__metadata__":{"format":"pt"}'


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: ``file`` [``start``, ``end``) in bytes from the start of the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def has_weights(folder: Path) -> bool:
    """Whether ``folder`` holds a model as safetensors."""
    return any((folder / name).is_file() for name in (SINGLE_NAME, INDEX_NAME))


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


def read_tensor(entry: TensorEntry) -> Tensor:
    """One tensor of a dtype in ``TORCH_DTYPES``, in memory of its own.

    It is read, not mapped: pages of a mapped file count as the process's, and a shard would be limited by what the
    process may map. Raises CheckpointError if the file has become shorter since its header was read.
    """
    data = torch.empty(entry.end - entry.start, dtype=torch.uint8)
    with entry.file.open("rb") as stream:
        stream.seek(entry.start)
        read = stream.readinto(data.numpy().data)
    if read != data.numel():
        raise CheckpointError(
            f"{entry.file} is truncated: it ends at {entry.start + read} bytes; copy it again"
        )
    return data.view(TORCH_DTYPES[entry.dtype]).view(entry.shape)


class ShardWriter:
    """Writes a model's tensors to ``folder`` in the order in which they come.

    Each is written at once, behind a place that is kept free for the header, so that no more than one tensor is in
    memory. :meth:`close` gives the files their Hugging Face names: one ``model.safetensors``, or numbered shards of at
    most ``max_shard_bytes`` with ``model.safetensors.index.json``. The folder is expected to be a temporary one (see
    :func:`megatron_spd.checkpoint.folders.atomic_folder`): nothing is cleaned up on an error.
    """

    def __init__(self, folder: Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        self.folder = folder
        self.max_shard_bytes = max_shard_bytes
        self._shards: list[list[str]] = []
        self._total_bytes = 0
        self._begin()

    def _begin(self) -> None:
        """Nothing of the next shard is written yet."""
        self._names: list[str] = []
        self._header = [_METADATA]
        self._header_bytes = len(_METADATA) + 1  # and the closing brace
        self._bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Add one tensor (any device, any layout) of a new name; later changes to it are not seen.

        Raises CheckpointError for a dtype that is not in ``TORCH_DTYPES``, OSError where it cannot be written.
        """
        if tensor.dtype not in DTYPE_NAMES:
            raise CheckpointError(
                f"tensor {name} has dtype {tensor.dtype}; weights are stored as one of {list(DTYPE_NAMES)}"
            )
        stored = tensor.detach().to("cpu").contiguous()
        field = self._field(name, stored)
        # Readers ask for tensors that start at a multiple of their element's size, and the format allows no gaps.
        fits = (
            self._bytes + stored.nbytes <= self.max_shard_bytes
            and self._header_bytes + len(field) + 1 <= _HEADER_BYTES
            and self._bytes % stored.itemsize == 0
        )
        if self._names and not fits:
            self._flush()
            field = self._field(name, stored)
        # Opened for each: a writer that is given up leaves no open file.
        with self._part(len(self._shards)).open("ab") as file:
            if not self._names:
                file.truncate(8 + _HEADER_BYTES)
            file.write(stored.reshape(-1).view(torch.uint8).numpy().data)
        self._names.append(name)
        self._header.append(field)
        self._header_bytes += len(field) + 1  # and a comma
        self._bytes += stored.nbytes
        self._total_bytes += stored.nbytes

    def _field(self, name: str, stored: Tensor) -> str:
        """The tensor's part of the header, if it comes next."""
        place = [self._bytes, self._bytes + stored.nbytes]
        fields = {"dtype": DTYPE_NAMES[stored.dtype], "shape": list(stored.shape), "data_offsets": place}
        return f"{json.dumps(name)}:{json.dumps(fields)}"

    def _flush(self) -> None:
        """Write the shard's header in front of its tensors."""
        header = (",".join(self._header) + "}").encode()
        part = self._part(len(self._shards))
        with part.open("r+b") as file:
            # The format allows spaces behind the header.
            file.write(_HEADER_BYTES.to_bytes(8, "little") + header.ljust(_HEADER_BYTES))
        self._shards.append(self._names)
        self._begin()

    def _part(self, shard: int) -> Path:
        return self.folder / f"part-{shard}.safetensors"

    def close(self) -> None:
        """Write what is left and name the files."""
        self._flush()
        count = len(self._shards)
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
