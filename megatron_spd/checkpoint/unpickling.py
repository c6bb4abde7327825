"""Pickle files from strangers: read without running anything in them.

A pickle names functions and classes that its reader calls. Here only plain containers of data are called, by name;
some harmless classes of Megatron are replaced by an empty one; everything else is refused.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from megatron_spd.errors import CheckpointError


class Ignored:
    """Stands for an object whose content does not matter here."""

    def __init__(self, *args: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


#: What the metadata of a distributed checkpoint is made of, by module.
_METADATA_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {
        "SavePlan",
        "WriteItem",
        "WriteItemType",
        "TensorWriteData",
        "BytesIOWriteData",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "device"},
    "collections": {"OrderedDict"},
    "builtins": {"set"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
}
_MEGATRON_STRATEGIES = "megatron.core.dist_checkpointing.strategies."

#: Classes in Megatron-LM's own checkpoint files, beside weights, whose objects are not needed.
_IGNORED = (
    "megatron.core.enums.ModelType",
    "megatron.core.rerun_state_machine.RerunDiagnostic",
    "megatron.core.rerun_state_machine.RerunMode",
    "megatron.core.rerun_state_machine.RerunState",
    "megatron.core.transformer.enums.AttnBackend",
    "megatron.core.transformer.enums.CudaGraphScope",
    "megatron.core.transformer.enums.AttnMaskType",
    "megatron.core.transformer.enums.AttnType",
    "megatron.core.transformer.enums.LayerType",
    "megatron.core.transformer.enums.ModelType",
    "megatron.model.enums.ModelType",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    "numpy.ndarray",
    "numpy.dtype",
    "_codecs.encode",
    "signal.Signals",
)


class _Forbidden(pickle.UnpicklingError):
    """A pickle names what is not allowed."""


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _METADATA_CLASSES.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), (torch.dtype, torch.layout)):
            return getattr(torch, name)
        if module.startswith(_MEGATRON_STRATEGIES):
            return Ignored
        raise _Forbidden(f"{module}.{name}")


def read_metadata(file: Path) -> Metadata:
    """The ``.metadata`` of a folder of torch.distributed.checkpoint. Raises CheckpointError, without having called
    anything that the file names, where it is not made of what such metadata are made of."""
    try:
        with file.open("rb") as stream:
            metadata = _MetadataUnpickler(stream).load()
    except FileNotFoundError:
        raise CheckpointError(f"{file.parent} has no {file.name}; copy the whole folder again") from None
    except _Forbidden as error:
        raise CheckpointError(_refusal(file, error)) from None
    except Exception as error:
        # A damaged pickle can raise anything.
        raise CheckpointError(f"{file} is damaged ({type(error).__name__}); copy it again") from None
    if not isinstance(metadata, Metadata):
        raise CheckpointError(f"{file} holds no metadata of a distributed checkpoint; copy it again")
    return metadata


def load_state(file: Path) -> dict[str, Any]:
    """What ``torch.save`` wrote to ``file``, tensors memory-mapped where the file allows. Only tensors, plain
    containers and ``argparse.Namespace`` are made; raises CheckpointError for anything else in it."""

    def load() -> Any:
        try:
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:
            # Files of before PyTorch 1.6 cannot be mapped.
            return torch.load(file, map_location="cpu", weights_only=True)

    state = _restricted(file, load)
    if not isinstance(state, dict):
        raise CheckpointError(f"{file} holds a {type(state).__name__}, expected the state of a model")
    return state


def check_object(file: Path, content: bytes) -> None:
    """Raise CheckpointError where ``content``, which ``torch.save`` wrote into a part of ``file``, is more than what
    :func:`load_state` makes, or a stream of bytes (Transformer Engine's extra states). Nothing of it is run."""
    _restricted(file, lambda: torch.load(io.BytesIO(content), map_location="cpu", weights_only=True))


def _restricted(file: Path, load: Callable[[], Any]) -> Any:
    """``load()``, a restricted ``torch.load``, with what Megatron's files hold beside weights."""
    allowed: list[Any] = [argparse.Namespace, io.BytesIO, *((Ignored, name) for name in _IGNORED)]
    try:
        with _only_globals(allowed):
            return load()
    except pickle.UnpicklingError as error:
        raise CheckpointError(_refusal(file, error)) from None
    except Exception as error:
        raise CheckpointError(
            f"{file} is truncated or no checkpoint file ({type(error).__name__}); copy it again"
        ) from None


@contextlib.contextmanager
def _only_globals(allowed: list[Any]) -> Iterator[None]:
    """Inside, ``torch.load`` makes objects of ``allowed`` alone: what libraries have declared safe beside (numpy's own
    functions under names that are ignored here, among others) is put back afterwards."""
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        with torch.serialization.safe_globals(allowed):
            yield
    finally:
        torch.serialization.add_safe_globals(before)


def _refusal(file: Path, error: Exception) -> str:
    named = re.search(r"GLOBAL (\S+)", str(error))
    found = named[1] if named is not None else str(error).split("\n")[0]
    return (
        f"{file} holds more than weights ({found[:100]}), which could run code when it is loaded; nothing of it "
        "was run. Get the weights as safetensors, or let Megatron itself save them again without it"
    )
