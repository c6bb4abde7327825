"""Checkpoints as Megatron-LM writes them, made from Hugging Face folders, for tests of their readers."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_spd.checkpoint.hf import CheckpointReader
from megatron_spd.models.weights import shard_block, to_megatron

#: What today's names were called before Megatron-core, from the most special to the most general.
OLD_NAMES = {
    "embedding.": "language_model.embedding.",
    "output_layer.": "language_model.output_layer.",
    "decoder.final_layernorm.": "language_model.encoder.final_norm.",
    "decoder.": "language_model.encoder.",
    ".input_layernorm.": ".input_norm.",
    ".pre_mlp_layernorm.": ".post_attention_norm.",
    ".self_attention.linear_qkv.": ".self_attention.query_key_value.",
    ".self_attention.linear_proj.": ".self_attention.dense.",
    ".mlp.linear_fc1.": ".mlp.dense_h_to_4h.",
    ".mlp.linear_fc2.": ".mlp.dense_4h_to_h.",
}


def layer_parameters(reader: CheckpointReader, block: int, rank: int, ranks: int) -> dict[str, Tensor]:
    """A rank's Megatron-core parameters of one layer; those that the checkpoint does not have are left out."""
    shard = shard_block(reader.block(block), reader.family, rank, ranks)
    state = {}
    for entry in reader.family.written_out(reader.settings).megatron:
        norm = "norm" in entry.name
        if entry.name.endswith("weight") or (entry.sources[0] if norm else "self_attn.q_proj.bias") in shard:
            state |= to_megatron(shard, reader.family, reader.kv_groups // ranks, [entry.name])
    return state


def rank_parameters(
    reader: CheckpointReader, rank: int, ranks: int, blocks: range, padding: int = 0
) -> dict[str, Tensor]:
    """What one file holds: the layers ``blocks``, numbered from 0, and what stands in front of and behind all."""
    state: dict[str, Tensor] = {}
    for entry in reader.family.outer_tensors(reader.tied):
        if (blocks.start if entry.in_front else reader.num_layers - blocks.stop) == 0:
            table = reader.get(entry.name)[entry.offset :]
            if entry.vocabulary:
                table = torch.cat([table, table.new_full((padding, table.shape[1]), 9.0)]).chunk(ranks)[rank]
            state[entry.parameter] = table.clone()
    for number, block in enumerate(blocks):
        layer = layer_parameters(reader, block, rank, ranks)
        state |= {f"decoder.layers.{number}.{name}": t.clone() for name, t in layer.items()}
        state[f"decoder.layers.{number}.self_attention.linear_qkv._extra_state"] = None  # type: ignore[assignment]
    return state


def renamed(state: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """``state`` with parts of its names replaced, in turn."""
    result = {}
    for name, value in state.items():
        for now, then in names.items():
            if now.startswith(".") or name.startswith(now):
                name = name.replace(now, then, 1)
        result[name] = value
    return result


def write_legacy(
    base: Path,
    out: Path,
    ranks: int = 1,
    stages: tuple[int, ...] = (),
    names: Mapping[str, str] | None = None,
    padding: int = 0,
    chunks: int = 0,
    **changes: Any,
) -> Path:
    """``out/iter_0000007/mp_rank_...`` and the tracker file, for the model in ``base``; returns ``out``.

    ``stages``: how many layers each pipeline stage has; none: no pipeline. ``chunks``: how many a stage of an
    interleaved pipeline has, of one layer each; 0: it is not interleaved. ``names``: replacements in names.
    ``changes``: to what a file holds beside the model.
    """
    reader = CheckpointReader(base)
    ends = [sum(stages[: i + 1]) for i in range(len(stages))] or [reader.num_layers]
    for rank in range(ranks):
        for stage, end in enumerate(ends):
            parts = {"model": range(ends[stage - 1] if stage else 0, end)}
            if chunks:
                firsts = [chunk * len(ends) + stage for chunk in range(chunks)]
                parts = {f"model{chunk}": range(first, first + 1) for chunk, first in enumerate(firsts)}
            models = {
                key: renamed(rank_parameters(reader, rank, ranks, blocks, padding), names or {})
                for key, blocks in parts.items()
            }
            args = argparse.Namespace(
                tensor_model_parallel_size=ranks,
                pipeline_model_parallel_size=len(ends),
                params_dtype=torch.float32,
            )
            state = {"args": args, "checkpoint_version": 3.0, "iteration": 7} | models | changes
            suffix = f"_{stage:03d}" if stages else ""
            file = out / "iter_0000007" / f"mp_rank_{rank:02d}{suffix}" / "model_optim_rng.pt"
            file.parent.mkdir(parents=True)
            torch.save(state, file)
    (out / "latest_checkpointed_iteration.txt").write_text("7")
    return out
