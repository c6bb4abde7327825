"""Megatron-core's distributed checkpoints ("torch_dist"), one tensor at a time, in one process.

They are folders of torch.distributed.checkpoint: whole tensors under global names in as many pieces as ranks wrote
them, so that any tensor-parallel and pipeline-parallel layout reads them. Layers are numbered in the names, or stacked
along a first axis ("homogeneous layers"); so are experts, the second axis then, or numbered ("singleton local shards").
``[gate; up]`` lie one after the other as for one rank, in one tensor or two.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import (
    CheckpointException,
    DefaultLoadPlanner,
    DefaultSavePlanner,
    FileSystemReader,
    LoadPlan,
    WriteItem,
)
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_spd.checkpoint.megatron_names import canonical
from megatron_spd.checkpoint.megatron_store import DIST_CONFIG
from megatron_spd.checkpoint.unpickling import check_object, load_state, read_metadata
from megatron_spd.errors import CheckpointError

METADATA_FILE, COMMON_FILE = ".metadata", "common.pt"
#: What Megatron-core expects in ``metadata.json``.
_CONFIG = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
#: Keys of a training checkpoint that are no parameters of the model.
_OTHER_STATE = ("optimizer", "opt_param_scheduler", "rng_state", "rerun_state_machine")
#: The two halves of a gated MLP's first linear, where they are kept apart: gate before up.
_HALF = re.compile(r"(.*\.linear_fc1\.(?:weight|bias))_[wv]")
#: What stands in front of the number of a layer and of an expert, where there is none.
_STACKED_LAYERS = re.compile(r"^decoder\.layers(?=\.\D)")
_STACKED_EXPERTS = re.compile(r"\.mlp\.experts\.experts(?=\.\D)")


@dataclass(frozen=True)
class _Place:
    """A tensor of the folder, or what lies at ``index`` of the first axes of a stacked one."""

    key: str
    index: tuple[int, ...] = ()


@dataclass(frozen=True)
class Stacked:
    """``count`` tensors like ``like`` (without data) that are one tensor, along a first axis, of which each is a piece
    by itself. To torch.distributed.checkpoint it is an object that says itself how it is written."""

    count: int
    like: Tensor

    def __create_write_items__(self, key: str, value: object) -> list[WriteItem]:
        shape = self.like.shape
        properties = TensorProperties.create_from_tensor(self.like)
        items = []
        for number in range(self.count):
            chunk = ChunkStorageMetadata(torch.Size([number, *(0 for _ in shape)]), torch.Size([1, *shape]))
            data = TensorWriteData(chunk, properties, torch.Size([self.count, *shape]))
            items.append(WriteItem(MetadataIndex(key, chunk.offsets), WriteItemType.SHARD, tensor_data=data))
        return items


class DistStore:
    """The parameters of a model in a torch_dist folder (a ``ParameterStore`` of one rank).

    Opening it reads no weights, but checks that the pieces of every tensor are all there. Raises CheckpointError for
    another format, missing or truncated files, and metadata that would run code.
    """

    ranks = 1

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        _check_format(folder)
        self._metadata = read_metadata(folder / METADATA_FILE)
        try:
            self._tensors = _model_tensors(self._metadata)
            self._places = _places(self._tensors)
            _check_pieces(folder, self._metadata, self._tensors)
        except (AttributeError, TypeError, LookupError):
            raise CheckpointError(f"{folder / METADATA_FILE} is damaged; copy it again") from None
        self._reader = FileSystemReader(folder)
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)

    @property
    def stacked(self) -> bool:
        """Whether layers are stacked along a first axis."""
        return any(_STACKED_LAYERS.search(key) for key in self._tensors)

    @property
    def apart(self) -> bool:
        """Whether gate and up are two tensors, and experts are numbered."""
        return any(_HALF.fullmatch(key) for key in self._tensors)

    @property
    def spellings(self) -> Collection[str]:
        """What the tensors are called in the folder."""
        return self._tensors.keys()

    def names(self) -> Collection[str]:
        return self._places.keys()

    def like(self, name: str, rank: int = 0) -> Tensor:
        return torch.cat([self._empty(place, torch.device("meta")) for place in self._places[name]])

    def load(self, name: str, rank: int = 0) -> Tensor:
        parts = [self._load(place) for place in self._places[name]]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def check_objects(self) -> None:
        """Look through the pickled objects that Megatron-core loads with a model: extra states, and from 0.19 on what
        older versions keep in ``common.pt``. Raises CheckpointError, without running anything in them, where one is
        more than data."""
        for index, place in self._metadata.storage_data.items():
            stored = self._metadata.state_dict_metadata.get(index.fqn)
            if isinstance(stored, BytesStorageMetadata) and not index.fqn.startswith(_OTHER_STATE):
                check_object(*_content(self.folder, place, index.fqn))
        if (self.folder / COMMON_FILE).exists():
            load_state(self.folder / COMMON_FILE)

    def _empty(self, place: _Place, device: torch.device) -> Tensor:
        stored = self._tensors[place.key]
        size = stored.size[len(place.index) :]
        return torch.empty(size, dtype=stored.properties.dtype, device=device)

    def _load(self, place: _Place) -> Tensor:
        stored, target = self._tensors[place.key], self._empty(place, torch.device("cpu"))
        stacked = target[(None,) * len(place.index)]
        start = torch.Size([*place.index, *(0 for _ in target.shape)])
        wanted = ChunkStorageMetadata(start, stacked.size())
        items = create_read_items_for_chunk_list(place.key, stored, [wanted])
        try:
            self._reader.read_data(LoadPlan(items), _IntoTensor(stacked)).wait()
        except Exception as error:
            # A damaged file can raise anything.
            raise CheckpointError(
                f"tensor {place.key} in {self.folder} cannot be read ({type(error).__name__}); copy the folder again"
            ) from None
        return target


class _IntoTensor(DefaultLoadPlanner):
    """Everything that is read goes into one tensor."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self._target = target

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self._target


class _WhenWritten(DefaultSavePlanner):
    """A tensor of the state is asked for when its turn comes to be written, and forgotten afterwards."""

    def __init__(self, load: Callable[[str, int], Tensor]) -> None:
        super().__init__(flatten_state_dict=False)
        self._load = load

    def lookup_object(self, index: MetadataIndex) -> Any:
        found = self.state_dict[index.fqn]
        if isinstance(found, Stacked):
            assert index.offset is not None  # each of its pieces has one
            return self._load(index.fqn, index.offset[0])[None]
        return self._load(index.fqn, 0) if isinstance(found, Tensor) else found


def write_dist(
    folder: Path, state: Mapping[str, Any], load: Callable[[str, int], Tensor], common: Mapping[str, Any]
) -> None:
    """Write a torch_dist folder that Megatron-core's ``dist_checkpointing.load`` reads.

    ``state``: keys to tensors without data (device "meta"), to :class:`Stacked` ones, and to anything else, which is
    pickled. ``load(key, n)`` gives data, one tensor at a time: the n-th of those stacked, 0 for a tensor by itself.
    ``common``: what is not sharded. Needs no process group. Raises what ``load`` raises.
    """
    with warnings.catch_warnings():
        # It remarks that there is one process only.
        warnings.simplefilter("ignore", UserWarning)
        writer = dcp.FileSystemWriter(folder)
        try:
            dcp.save(dict(state), storage_writer=writer, planner=_WhenWritten(load), no_dist=True)
        except CheckpointException as error:
            # What went wrong in reading or writing is more than that something went wrong.
            reason, _ = next(iter(error.failures.values()))
            raise reason from None
    torch.save(dict(common), folder / COMMON_FILE)
    # Last: its presence says that the checkpoint is complete.
    (folder / DIST_CONFIG).write_text(json.dumps(_CONFIG) + "\n", encoding="utf-8")


def _check_format(folder: Path) -> None:
    file = folder / DIST_CONFIG
    try:
        backend = json.loads(file.read_text(encoding="utf-8"))["sharded_backend"]
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} has no {DIST_CONFIG}: it was not written to its end; save or copy it again"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{file} does not say the format of the checkpoint; copy it again") from None
    if backend != _CONFIG["sharded_backend"]:
        raise CheckpointError(
            f"{folder} is a distributed checkpoint of format {backend!r}, expected 'torch_dist'; save it again with "
            "Megatron-LM's --ckpt-format torch_dist"
        )


def _model_tensors(metadata: Metadata) -> dict[str, TensorStorageMetadata]:
    return {
        key: stored
        for key, stored in metadata.state_dict_metadata.items()
        if isinstance(stored, TensorStorageMetadata) and not key.startswith(_OTHER_STATE)
    }


def _places(tensors: Mapping[str, TensorStorageMetadata]) -> dict[str, list[_Place]]:
    """Where each parameter lies: by its canonical name the tensors that make it, one after the other. Of two keys
    that say the same any is taken."""
    places: dict[str, list[_Place]] = {}
    for key in sorted(tensors):
        name = _HALF.sub(r"\1", key)
        for spelled, index in _unstacked(name, tensors[key].size):
            others = places.get(canonical(spelled), []) if name != key else []
            places[canonical(spelled)] = [*others, _Place(key, index)]
    return {name: sorted(found, key=lambda p: p.key.endswith("_v")) for name, found in places.items()}


def _piece_file(folder: Path, place: Any, key: str) -> Path:
    """The file of ``folder`` in which a piece of ``key`` lies. Raises CheckpointError where there is none."""
    file: Path = folder / place.relative_path
    if file.parent != folder or not file.is_file():
        raise CheckpointError(f"{folder} lacks {place.relative_path}, which holds {key}; copy it there")
    return file


def _content(folder: Path, place: Any, key: str) -> tuple[Path, bytes]:
    """The file that holds the object ``key``, and its bytes; fewer than there should be where they are not there."""
    file = _piece_file(folder, place, key)
    with file.open("rb") as stream:
        stream.seek(place.offset)
        return file, stream.read(place.length)


def _unstacked(name: str, size: torch.Size) -> list[tuple[str, tuple[int, ...]]]:
    """What a tensor called ``name`` holds: names with the numbers of layer and expert, and where along its first axes
    they lie."""
    found: list[tuple[str, tuple[int, ...]]] = [(name, ())]
    for stack in _STACKED_LAYERS, _STACKED_EXPERTS:
        if stack.search(name):
            count = size[len(found[0][1])]
            found = [(stack.sub(rf"\g<0>.{i}", n), (*at, i)) for n, at in found for i in range(count)]
    return found


def _check_pieces(folder: Path, metadata: Metadata, tensors: Mapping[str, TensorStorageMetadata]) -> None:
    sizes: dict[str, int] = {}
    for key, stored in tensors.items():
        held = sum(math.prod(chunk.sizes) for chunk in stored.chunks)
        if held != math.prod(stored.size):
            raise CheckpointError(
                f"{folder / METADATA_FILE}: pieces of {key} have {held} of {math.prod(stored.size)} values; "
                "a rank's part is missing, copy or save it again"
            )
        for chunk in stored.chunks:
            place = metadata.storage_data[MetadataIndex(key, chunk.offsets)]
            file = _piece_file(folder, place, key)
            size = sizes.setdefault(place.relative_path, file.stat().st_size)
            if place.offset + place.length > size:
                raise CheckpointError(
                    f"{file} is truncated: it has {size} bytes, {key} ends at {place.offset + place.length}; "
                    "copy it again"
                )
