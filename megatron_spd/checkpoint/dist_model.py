"""GPTModels and torch_dist folders: a whole model written tensor by tensor, a live one saved and loaded by its ranks.

What a checkpoint calls its tensors is asked of Megatron-core itself: a GPTModel without data, on one rank. Layers are
numbered in the names ("non-homogeneous"), since blocks of an SPD model differ; no name depends on the ranks of either
kind of parallelism.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.core import __version__ as megatron_version
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.models.gpt import GPTModel
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException

from megatron_spd.checkpoint.dist import DistStore, Stacked, write_dist
from megatron_spd.checkpoint.folders import atomic_folder, copy_side_files
from megatron_spd.checkpoint.megatron import SOURCE_FILE, MegatronReader
from megatron_spd.checkpoint.megatron_names import FIRST_ROWS, canonical, split_layer_name
from megatron_spd.checkpoint.megatron_store import TRACKER, find_checkpoint, is_dist
from megatron_spd.checkpoint.view import ModelView, stored_plan
from megatron_spd.errors import CheckpointError, PlanError
from megatron_spd.models.build import ModelShape, build_gpt_model
from megatron_spd.models.family import POSITIONS
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

    One parameter at a time is in memory, of experts that of one. ``config.json`` (with the plan) and the tokenizer go
    beside the weights. What was written is read again before ``out`` appears. ``runtime``: of one process. Returns the
    model's fingerprint. Raises CheckpointError for what Megatron-core cannot hold; UserError if ``out`` holds something
    or the disk is full.
    """
    with atomic_folder(out) as partial:
        folder = partial / _RELEASE
        folder.mkdir()
        state, names = _state(view, runtime)
        common = _COMMON | {"content_metadata": _LAYOUT}
        write_dist(folder, state, lambda key, n: megatron_parameter(view, names[key][n], view.get), common)
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
        items = enumerate(_items(model, view, runtime, view.get))
        state = {f"{number} {name}": item for number, (name, item) in items}
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
    layout = {"non_homogeneous_layers": not store.stacked, "singleton_local_shards": store.apart}
    wanted = model.sharded_state_dict(metadata=_layout(runtime) | layout)
    # Layer specs of Megatron-core differ in what they call a norm.
    spelled = {canonical(key): key for key in store.spellings}
    for item in wanted.values():
        item.key = spelled.get(canonical(item.key), item.key)
    try:
        state = dist_checkpointing.load(wanted, str(found))
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


def _items(
    model: GPTModel, view: ModelView, runtime: Runtime, get: Callable[[str], Tensor]
) -> list[tuple[str, Any]]:
    """This rank's state by the names of ``model``, each with its place in a checkpoint; ``get`` as for
    :func:`megatron_parameter`.

    There is more in it than Megatron-core's own: rows of a table of positions that it has no place for; and with
    experts, the norm in front of them twice, because its layer specs with and without Transformer Engine call it by
    different names. It passes over what it does not look for.
    """
    items = list(model.sharded_state_dict(metadata=_layout(runtime)).items())
    family = view.reader.family
    if family.tables.experts:
        norms = [(name, item) for name, item in items if ".pre_mlp_layernorm." in name]
        items += [(name, dataclasses.replace(item, key=canonical(item.key))) for name, item in norms]
    if family.positions is not None and family.positions.offset:
        rows = megatron_parameter(view, FIRST_ROWS, get).to(model.config.params_dtype)
        place = ShardedTensor.from_rank_offsets(FIRST_ROWS, rows.clone(), replica_id=runtime.rank)
        items.append((FIRST_ROWS, place))
    return items


def _state(view: ModelView, runtime: Runtime) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """For every key of the checkpoint a tensor without data, tensors that are stacked, or an object; and the parameters
    behind the tensors."""
    state: dict[str, Any] = {}
    names: dict[str, list[str]] = defaultdict(list)
    for name, item in _items(_empty_model(view, runtime), view, runtime, view.like):
        if isinstance(item, ShardedObject):
            state[item.unique_key] = [item.data]
            continue
        like = megatron_parameter(view, name, view.like)
        if like.shape != item.data.shape:
            raise CheckpointError(
                f"parameter {name} has shape {list(like.shape)}, Megatron-core expects {list(item.data.shape)}"
            )
        names[item.key].append(name)
        part = item.build()[0] if isinstance(item, ShardedTensorFactory) else item
        if not part.prepend_axis_num:
            state[item.key] = like
            continue
        first = state.setdefault(item.key, Stacked(part.global_shape[0], like)).like
        _check_dtypes(name, {first.dtype, like.dtype})
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
        outer = {entry.parameter: entry for entry in reader.family.outer_tensors(reader.tied)}
        entry = outer[POSITIONS if name == FIRST_ROWS else name]
        table = get(entry.name)
        return table[: entry.offset] if name == FIRST_ROWS else table[entry.offset :]
    block, part = place
    source = _BlockTensors(view, block, get)
    parameter = to_megatron(source, reader.family, reader.kv_groups, [part])[part]
    _check_dtypes(name, source.dtypes)
    return parameter


def _check_dtypes(name: str, dtypes: set[torch.dtype]) -> None:
    """Raise CheckpointError unless what makes parameter ``name`` is of one dtype."""
    if len(dtypes) > 1:
        raise CheckpointError(
            f"parameter {name} is made of tensors of {sorted(map(str, dtypes))}; Megatron-core has one dtype "
            "for them, convert the model to one first"
        )


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
