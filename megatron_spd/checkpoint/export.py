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
from megatron_spd.errors import CheckpointError, UserError
from megatron_spd.plan import SPDPlan

#: The code shipped in an export, beside this file.
REMOTE_CODE = Path(__file__).parent / "remote_code"
_CONFIG_CLASS = "configuration_spd_llama.SPDLlamaConfig"
_MODEL_CLASS = "modeling_spd_llama.SPDLlamaForCausalLM"


def export(
    reader: CheckpointReader,
    plan: SPDPlan,
    blocks: Callable[[int], Mapping[str, Tensor]],
    out: Path,
    max_shard_bytes: int = 5 * 1024**3,
) -> None:
    """Write the SPD model that ``plan`` makes of ``reader``'s model to the folder ``out``, which appears whole or not.

    ``blocks(i)`` gives the final weights of block ``i`` by block-relative name, whole tensors, heads and neurons in the
    plan's order, with the branch tensors [G, h] (shift, norm weight and bias) that the plan gives the block; it is
    called once per block, in order. They are stored in the dtype of the base model, under the family's usual names.
    ``config.json`` is the base model's with its own ``model_type`` (a loader without our code refuses it), the plan,
    and ``auto_map`` to the copied code.

    Raises PlanError if the plan is of another model; CheckpointError if ``reader`` is itself an export, or a block's
    tensors are not those of the plan or not finite; UserError if ``out`` holds anything but an earlier export of the
    same plan, which is replaced, or the disk is full.
    """
    if reader.plan is not None:
        raise CheckpointError(
            f"{reader.folder} is an SPD export already; give the plain model it was made from"
        )
    plan.check_model(reader.fingerprint(), str(reader.folder))
    with atomic_folder(Path(out), may_replace=lambda folder: _holds_export_of(folder, plan)) as folder:
        writer = ShardWriter(folder, max_shard_bytes)
        writer.add(reader.family.embedding, reader.get(reader.family.embedding))
        for block in range(plan.num_layers):
            weights = blocks(block)
            _check_block(reader, plan, block, weights)
            for name, tensor in weights.items():
                dtype = _stored_dtype(reader, block, name)
                writer.add(reader.family.block_name(block, name), tensor.to(dtype))
        writer.add(reader.family.final_norm, reader.get(reader.family.final_norm))
        if not reader.tied:
            writer.add(reader.family.output_layer, reader.get(reader.family.output_layer))
        writer.close()
        copy_side_files(reader.folder, folder)
        for file in _CONFIG_CLASS, _MODEL_CLASS:
            shutil.copyfile(REMOTE_CODE / f"{file.split('.')[0]}.py", folder / f"{file.split('.')[0]}.py")
        config = json.dumps(_config(reader, plan), indent=1, sort_keys=True) + "\n"
        (folder / "config.json").write_text(config, encoding="utf-8")


def _config(reader: CheckpointReader, plan: SPDPlan) -> dict[str, Any]:
    return reader.config | {
        "model_type": reader.family.spd_model_type,
        "architectures": [_MODEL_CLASS.split(".")[1]],
        "auto_map": {"AutoConfig": _CONFIG_CLASS, "AutoModelForCausalLM": _MODEL_CLASS},
        "spd_branches": plan.branches,
        "spd_plan": plan.to_dict(),
    }


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


def _check_block(reader: CheckpointReader, plan: SPDPlan, block: int, weights: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError unless ``weights`` are the tensors that the model and the plan want in this block."""
    family = reader.family
    expected = {name: reader.shape(family.block_name(block, name)) for name in reader.block_names(block)}
    planned = family.planned_branch_tensors(plan.blocks[block])
    expected |= {entry.source: (plan.branches, reader.hidden_size) for entry in planned}
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
