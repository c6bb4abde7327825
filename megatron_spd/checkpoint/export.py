"""Writing an SPD model as a Hugging Face folder that loads with torch and transformers alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_spd.checkpoint.folders import atomic_folder, copy_side_files
from megatron_spd.checkpoint.hf import CheckpointReader, ShardWriter, all_finite, read_config
from megatron_spd.checkpoint.safetensors_io import MAX_SHARD_BYTES
from megatron_spd.errors import CheckpointError, UserError
from megatron_spd.plan import SPDPlan

#: The code shipped in an export, beside this file.
REMOTE_CODE = Path(__file__).parent / "remote_code"
_CONFIG_MODULE, _MODEL_MODULE = "configuration_spd", "modeling_spd"


def export(
    reader: CheckpointReader,
    plan: SPDPlan,
    blocks: Callable[[int], Mapping[str, Tensor]],
    out: Path,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    trained: Callable[[str], Tensor] | None = None,
) -> None:
    """Write the SPD model that ``plan`` makes of ``reader``'s model to the folder ``out``, which appears whole or not.

    ``blocks(i)`` gives the final weights of block ``i`` by block-relative name, whole tensors, heads and neurons in the
    plan's order, with the branch tensors [G, h] (shift, norm weight and bias) that the plan gives the block; it is
    called once per block, in order. They are stored in the dtype of the base model, under the family's usual names.
    ``config.json`` is the base model's with its own ``model_type`` (a loader without our code refuses it), the plan,
    and ``auto_map`` to the copied code. ``trained(name)``: the embedding, the final norm and the output layer where
    they were trained as well (default: ``reader``'s); ``reader`` may then be itself an export.

    Raises PlanError if the plan is of another model; CheckpointError if ``reader`` is an export (without ``trained``),
    or a tensor is not that of the plan or not finite; UserError if ``out`` holds anything but an earlier export of the
    same plan, which is replaced, or the disk is full.
    """
    if reader.plan is not None and trained is None:
        raise CheckpointError(
            f"{reader.folder} is an SPD export already; give the plain model it was made from"
        )
    plan.check_model(reader.base_model().fingerprint, str(reader.folder))
    outer = trained or reader.get
    with atomic_folder(Path(out), may_replace=lambda folder: _holds_export_of(folder, plan)) as folder:
        writer = ShardWriter(folder, max_shard_bytes)
        for name in reader.outer_names():
            _add_outer(writer, reader, name, outer)
        for block in range(plan.num_layers):
            _add_block(writer, reader, plan, block, blocks(block))
        writer.close()
        copy_side_files(reader.folder, folder)
        write_spd_config(folder, spd_config(reader, plan))


def _add_block(
    writer: ShardWriter, reader: CheckpointReader, plan: SPDPlan, block: int, weights: Mapping[str, Tensor]
) -> None:
    """Write a block's final weights. (None of them is in memory any more when the next block is read.)"""
    _check_block(reader, plan, block, weights)
    for name, tensor in weights.items():
        dtype = _stored_dtype(reader, block, name)
        writer.add(reader.family.block_name(block, name), tensor.to(dtype))


def _add_outer(
    writer: ShardWriter, reader: CheckpointReader, name: str, outer: Callable[[str], Tensor]
) -> None:
    """Write a tensor that belongs to no block, in the base model's dtype."""
    tensor = outer(name)
    if not all_finite(tensor):
        raise CheckpointError(f"to export: {name} holds NaN or infinity; train again with a lower rate")
    writer.add(name, tensor.to(reader.dtype(name)))


def write_spd_config(folder: Path, config: dict[str, Any]) -> None:
    """Write an export's ``config.json`` and the code that it points to."""
    for module in _CONFIG_MODULE, _MODEL_MODULE:
        shutil.copyfile(REMOTE_CODE / f"{module}.py", folder / f"{module}.py")
    text = json.dumps(config, indent=1, sort_keys=True) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")


def spd_config(reader: CheckpointReader, plan: SPDPlan) -> dict[str, Any]:
    """The ``config.json`` of an export of ``reader``'s model with ``plan``."""
    family = reader.family
    model = f"SPD{family.classes}ForCausalLM"
    config = reader.config | {
        "model_type": family.spd_model_type,
        "architectures": [model],
        "auto_map": {
            "AutoConfig": f"{_CONFIG_MODULE}.SPD{family.classes}Config",
            "AutoModelForCausalLM": f"{_MODEL_MODULE}.{model}",
        },
        "spd_branches": plan.branches,
        "spd_plan": plan.to_dict(),
    }
    return config | ({"spd_stored_names": dict(family.stored_names)} if family.stored_names else {})


def _holds_export_of(folder: Path, plan: SPDPlan) -> bool:
    try:
        return SPDPlan.from_dict(read_config(folder).get("spd_plan")) == plan
    except UserError:
        return False


def _stored_dtype(reader: CheckpointReader, block: int, name: str) -> torch.dtype:
    """The base model's dtype of the tensor; for a branch tensor, which it lacks, that of its first norm."""
    full = reader.family.block_name(block, name)
    if full not in reader.names():
        full = reader.family.block_name(block, reader.block_names(block)[0])
    return reader.dtype(full)


def planned_tensors(reader: CheckpointReader, plan: SPDPlan, block: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that an export of ``reader``'s model under ``plan`` has in ``block``."""
    family = reader.family
    tensors = {name: reader.shape(family.block_name(block, name)) for name in reader.block_names(block)}
    planned = family.planned_branch_tensors(plan.blocks[block])
    return tensors | {entry.source: (plan.branches, reader.hidden_size) for entry in planned}


def _check_block(reader: CheckpointReader, plan: SPDPlan, block: int, weights: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError unless ``weights`` are the tensors that the model and the plan want in this block."""
    expected = planned_tensors(reader, plan, block)
    if expected.keys() != weights.keys():
        wrong = sorted(expected.keys() ^ weights.keys())
        raise CheckpointError(f"block {block} to export: tensors {wrong} are missing or not in the plan")
    for name, tensor in weights.items():
        if tuple(tensor.shape) != expected[name]:
            raise CheckpointError(
                f"block {block} to export: {name} has shape {list(tensor.shape)}, expected {list(expected[name])}"
            )
        if not all_finite(tensor):
            raise CheckpointError(f"block {block} to export: {name} holds NaN or infinity; distil it again")
