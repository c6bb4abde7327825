"""Megatron-core's distributed checkpoints ("torch_dist"), one tensor at a time, in one process.

They are folders of torch.distributed.checkpoint: whole tensors under global names in as many pieces as ranks wrote
them, so that any tensor-parallel and pipeline-parallel layout reads them. Layers are numbered in the names, or stacked
along a first axis ("homogeneous layers"). ``[gate; up]`` lie one after the other as for one rank, in one tensor or two.
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
)
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_spd.checkpoint.megatron_names import canonical, layer_name
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
_STACKED = re.compile(r"decoder\.layers\.(?!\d)(.+)")


@dataclass(frozen=True)
class _Place:
    """A tensor of the folder, or one layer of a stacked one."""

    key: str
    layer: int | None = None


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
        return any(place.layer is not None for places in self._places.values() for place in places)

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
                check_object(*_content(self.folder, place))
        if (self.folder / COMMON_FILE).exists():
            load_state(self.folder / COMMON_FILE)

    def _empty(self, place: _Place, device: torch.device) -> Tensor:
        stored = self._tensors[place.key]
        size = stored.size if place.layer is None else stored.size[1:]
        return torch.empty(size, dtype=stored.properties.dtype, device=device)

    def _load(self, place: _Place) -> Tensor:
        stored, target = self._tensors[place.key], self._empty(place, torch.device("cpu"))
        stacked = target if place.layer is None else target[None]
        start = [0] * stacked.dim()
        if place.layer is not None:
            start[0] = place.layer
        wanted = ChunkStorageMetadata(torch.Size(start), stacked.size())
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

    def __init__(self, load: Callable[[str], Tensor]) -> None:
        super().__init__(flatten_state_dict=False)
        self._load = load

    def lookup_object(self, index: MetadataIndex) -> Any:
        found = super().lookup_object(index)
        return self._load(index.fqn) if isinstance(found, Tensor) else found


def write_dist(
    folder: Path, state: Mapping[str, Any], load: Callable[[str], Tensor], common: Mapping[str, Any]
) -> None:
    """Write a torch_dist folder that Megatron-core's ``dist_checkpointing.load`` reads.

    ``state``: keys to tensors without data (device "meta"), whose data ``load(key)`` gives, one at a time; and to
    anything else, which is pickled. ``common``: what is not sharded. Needs no process group. Raises what ``load``
    raises.
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
    """Where each parameter lies: by its canonical name the tensors that make it, one after the other."""
    places: dict[str, list[_Place]] = {}
    for key in sorted(tensors):
        name = _HALF.sub(r"\1", key)
        stacked = _STACKED.fullmatch(name)
        if stacked is None:
            places.setdefault(canonical(name), []).append(_Place(key))
            continue
        for layer in range(tensors[key].size[0]):
            places.setdefault(canonical(layer_name(layer, stacked[1])), []).append(_Place(key, layer))
    return {name: sorted(found, key=lambda p: p.key.endswith("_v")) for name, found in places.items()}


def _content(folder: Path, place: Any) -> tuple[Path, bytes]:
    """The file that holds an object, and its bytes; fewer than there should be where they are not there."""
    file = folder / place.relative_path
    if file.parent != folder or not file.is_file():
        raise CheckpointError(f"{folder} lacks {place.relative_path}; copy it there")
    with file.open("rb") as stream:
        stream.seek(place.offset)
        return file, stream.read(place.length)


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
            file = folder / place.relative_path
            if file.parent != folder or not file.is_file():
                raise CheckpointError(
                    f"{folder} lacks {place.relative_path}, which holds {key}; copy it there"
                )
            size = sizes.setdefault(place.relative_path, file.stat().st_size)
            if place.offset + place.length > size:
                raise CheckpointError(
                    f"{file} is truncated: it has {size} bytes, {key} ends at {place.offset + place.length}; "
                    "copy it again"
                )
