"""GPTModels and torch_dist folders: a whole model written tensor by tensor, a live one saved and loaded by its ranks.

What a checkpoint calls its tensors is asked of Megatron-core itself: a GPTModel without data, on one rank. Layers are
numbered in the names ("non-homogeneous"), since blocks of an SPD model differ; no name depends on the ranks of either
kind of parallelism.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.core import __version__ as megatron_version
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.models.gpt import GPTModel
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException

from megatron_spd.checkpoint.dist import DistStore, write_dist
from megatron_spd.checkpoint.folders import atomic_folder, copy_side_files
from megatron_spd.checkpoint.megatron import SOURCE_FILE, MegatronReader
from megatron_spd.checkpoint.megatron_names import outer_parameters, split_layer_name
from megatron_spd.checkpoint.megatron_store import TRACKER, find_checkpoint, is_dist
from megatron_spd.checkpoint.view import ModelView, stored_plan
from megatron_spd.errors import CheckpointError, PlanError
from megatron_spd.models.build import ModelShape, build_gpt_model
from megatron_spd.models.weights import to_megatron
from megatron_spd.plan import SPDPlan
from megatron_spd.runtime.distributed import Runtime

#: What Megatron-core's ``sharded_state_dict`` and Megatron-LM's loader are told of the layout.
_LAYOUT = {"singleton_local_shards": False, "non_homogeneous_layers": True}
_COMMON = {"checkpoint_version": 3.0, "iteration": 0}
#: The folder inside, by the name that Megatron-LM gives to weights without a training step.
_RELEASE = "release"


def write_megatron(view: ModelView, runtime: Runtime, out: Path) -> str:
    """Write a model as Megatron-LM keeps checkpoints: ``out/release``, a torch_dist folder, and the tracker file.

    One parameter at a time is in memory. ``config.json`` (with the plan) and the tokenizer go beside the weights. What
    was written is read again before ``out`` appears. ``runtime``: of one process. Returns the model's fingerprint.
    Raises CheckpointError for what Megatron-core cannot hold; UserError if ``out`` holds something or the disk is full.
    """
    with atomic_folder(out) as partial:
        folder = partial / _RELEASE
        folder.mkdir()
        state, names = _state(view, runtime)
        common = _COMMON | {"content_metadata": _LAYOUT}
        write_dist(folder, state, lambda key: megatron_parameter(view, names[key], view.get), common)
        _write_side_files(view, folder)
        (partial / TRACKER).write_text(_RELEASE, encoding="utf-8")
        fingerprint = MegatronReader(partial).fingerprint()
        (folder / SOURCE_FILE).write_text(json.dumps({"fingerprint": fingerprint}) + "\n", encoding="utf-8")
    return fingerprint


def save_model(model: GPTModel, view: ModelView, runtime: Runtime, folder: Path) -> None:
    """Save a live model from all its ranks into the torch_dist folder ``folder``, which appears whole or not.

    ``view`` says which model it is: its config (with the plan) and tokenizer go beside the weights. Every rank calls
    this. Raises UserError if ``folder`` holds something or the disk is full.
    """
    partial = folder.with_name(folder.name + ".partial")
    with atomic_folder(folder) if runtime.is_main else contextlib.nullcontext(partial):
        runtime.barrier()
        state = model.sharded_state_dict(metadata=_layout(runtime))
        dist_checkpointing.save(state | _COMMON, str(partial), content_metadata=dict(_LAYOUT))
        if runtime.is_main:
            _write_side_files(view, partial)
    runtime.barrier()


def load_model(model: GPTModel, plan: SPDPlan, runtime: Runtime, folder: Path) -> None:
    """Load a torch_dist checkpoint, whatever ranks it was written by, into a live model of ``plan``. Every rank calls
    this.

    ``folder``: of one checkpoint, or one with Megatron-LM's tracker file. Raises PlanError where the checkpoint has
    another plan; CheckpointError where it is damaged, would run code, or is of a model of another shape.
    """
    found = find_checkpoint(folder)
    if not is_dist(found):
        raise CheckpointError(f"{found} is no torch_dist checkpoint; convert it with `megatron-spd convert`")
    # Megatron-core unpickles what it reads: only after these have looked through it.
    store = DistStore(found)
    store.check_objects()
    _check_plan(plan, found)
    layout = _layout(runtime) | {"non_homogeneous_layers": not store.stacked}
    try:
        state = dist_checkpointing.load(model.sharded_state_dict(metadata=layout), str(found))
    except CheckpointException as error:
        # Of any rank: each has its own reason.
        reason, _ = next(iter(error.failures.values()))
        raise CheckpointError(
            f"{found} does not fit the model: {' '.join(str(reason).split())[:200]}"
        ) from None
    except CheckpointingException as error:
        # 0.16 reads no checkpoints of 0.19.
        raise CheckpointError(
            f"Megatron-core {megatron_version} cannot load {found}: {' '.join(str(error).split())[:200]}; if a newer "
            "one saved it, load it with that, or convert it with `megatron-spd convert`"
        ) from None
    model.load_state_dict(
        {name: value for name, value in state.items() if isinstance(value, Tensor)}, strict=False
    )


def _check_plan(plan: SPDPlan, folder: Path) -> None:
    """Raise PlanError unless the checkpoint's plan computes what ``plan`` does. One without any is a dense model."""
    stored = stored_plan(folder)
    if stored is None:
        stored = SPDPlan.dense(plan.base_model, plan.branches)
    for what in ("base_model", "branches", "sync_points", "blocks"):
        if getattr(stored, what) != getattr(plan, what):
            raise PlanError(
                f"the plan in {folder}/config.json is not the model's: they differ in {what}; build the model with the "
                "plan of the checkpoint"
            )


def _layout(runtime: Runtime) -> dict[str, Any]:
    return _LAYOUT | {"dp_cp_group": runtime.dp_group}


def _write_side_files(view: ModelView, folder: Path) -> None:
    config = json.dumps(view.config, indent=2) + "\n"
    (folder / "config.json").write_text(config, encoding="utf-8")
    copy_side_files(view.reader.folder, folder)


def _state(view: ModelView, runtime: Runtime) -> tuple[dict[str, Any], dict[str, str]]:
    """For every key of the checkpoint a tensor without data, or an object; and the parameter behind each tensor."""
    state: dict[str, Any] = {}
    names: dict[str, str] = {}
    for name, item in _empty_model(view, runtime).sharded_state_dict(metadata=_layout(runtime)).items():
        if isinstance(item, ShardedObject):
            state[item.unique_key] = [item.data]
            continue
        like = megatron_parameter(view, name, view.like)
        if like.shape != item.data.shape:
            raise CheckpointError(
                f"parameter {name} has shape {list(like.shape)}, Megatron-core expects {list(item.data.shape)}"
            )
        state[item.key], names[item.key] = like, name
    return state, names


def _empty_model(view: ModelView, runtime: Runtime) -> GPTModel:
    """The model on one rank, without data."""
    reader, meta = view.reader, torch.device("meta")
    plan = view.plan or SPDPlan.dense(reader.base_model(), 1)
    shape = ModelShape(reader.family, reader.config, reader.head_dim)

    def block(index: int) -> dict[str, Tensor]:
        names = reader.block_names(index)
        return {name: view.like(reader.family.block_name(index, name)) for name in names}

    with meta:
        return build_gpt_model(
            shape, plan, block, view.like, dataclasses.replace(runtime, device=meta), torch.float32
        )


def megatron_parameter(view: ModelView, name: str, get: Callable[[str], Tensor]) -> Tensor:
    """The Megatron-core parameter ``name`` for one rank, from the Hugging Face tensors that ``get`` gives."""
    reader = view.reader
    place = split_layer_name(name)
    if place is None:
        outer = {
            parameter: source for source, parameter in outer_parameters(reader.family, reader.tied).items()
        }
        return get(outer[name])
    block, part = place
    source = _BlockTensors(view, block, get)
    parameter = to_megatron(source, reader.family, reader.kv_groups, [part])[part]
    if any(dtype != parameter.dtype for dtype in source.dtypes):
        raise CheckpointError(
            f"parameter {name} is made of tensors of {sorted(map(str, source.dtypes))}; Megatron-core has one dtype "
            "for them, convert the model to one first"
        )
    return parameter


class _BlockTensors(Mapping[str, Tensor]):
    """A block's Hugging Face tensors by block-relative name, each got when it is asked for."""

    def __init__(self, view: ModelView, block: int, get: Callable[[str], Tensor]) -> None:
        self._family, self._block, self._get = view.reader.family, block, get
        self._names = view.reader.block_names(block)
        self.dtypes: set[torch.dtype] = set()

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        tensor = self._get(self._family.block_name(self._block, name))
        self.dtypes.add(tensor.dtype)
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
