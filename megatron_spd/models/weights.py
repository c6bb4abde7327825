"""Block weights between Hugging Face names (full tensors) and Megatron-core parameters (one rank's shard).

Everything follows from a family's tables: rank ``m`` of ``M`` holds the ``m``-th of ``M`` equal contiguous
parts of every split axis, so branch ``g`` of ``G`` lies on rank ``g * M // G``, for M > G on the M / G ranks from
there on. What a branch has one of (its branch tensors) each of these ranks holds whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from megatron_spd.models.family import ModelFamily
from megatron_spd.models.tables import MegatronTensor, expert_number
from megatron_spd.plan import BlockPlan, branches_of_rank

Weights = Mapping[str, Tensor]


def shard_block(weights: Weights, family: ModelFamily, rank: int, ranks: int) -> dict[str, Tensor]:
    """The part of a block's Hugging Face tensors that ``rank`` of ``ranks`` holds (views where possible)."""
    shard = {}
    for name, tensor in weights.items():
        entry = family.tensor(name)
        if entry.unit == "branch":
            shard[name] = tensor[branches_of_rank(len(tensor), rank, ranks)]
        else:
            shard[name] = tensor if entry.dim is None else tensor.chunk(ranks, entry.dim)[rank]
    return shard


def unshard_block(shards: list[dict[str, Tensor]], family: ModelFamily, branches: int) -> dict[str, Tensor]:
    """The inverse of :func:`shard_block`: full tensors from the shards of all ranks in rank order. ``branches``: G."""
    full = {}
    for name, first in shards[0].items():
        entry = family.tensor(name)
        parts = [s[name] for s in shards]
        if entry.unit == "branch":
            full[name] = join_branches(parts, branches)
        else:
            full[name] = first if entry.dim is None else torch.cat(parts, entry.dim).contiguous()
    return full


def join_branches(parts: Sequence[Tensor], branches: int) -> Tensor:
    """What all of G = ``branches`` have, [G, ...], from each rank's [B, ...] in rank order (B = 1 for M > G)."""
    return torch.cat(list(parts[:: max(1, len(parts) // branches)]))


def initial_branch_tensors(
    block: BlockPlan, family: ModelFamily, branches: int, hidden: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Hugging Face names to [G, h]: the branch tensors of ``block`` that start at a constant which changes nothing
    (norm weights 1, norm biases 0). Shifts are not among them: their values come from calibration."""
    return {
        entry.source: torch.full((branches, hidden), entry.initial, dtype=dtype)
        for entry in family.planned_branch_tensors(block)
        if entry.initial is not None
    }


def to_megatron(
    shard: Weights, family: ModelFamily, kv_groups: int, wanted: Iterable[str]
) -> dict[str, Tensor]:
    """Megatron-core parameters of one transformer layer from a rank's Hugging Face shard.

    ``kv_groups``: key/value groups on this rank. ``wanted``: the layer's parameter names. A bias that the
    checkpoint does not have is zero. Raises KeyError if a tensor that is not a bias is missing.
    """
    wanted = set(wanted)
    state = {entry.name: shard[entry.source] for entry in family.branch_tensors if entry.name in wanted}
    for entry in _entries(family, wanted):
        if entry.name in wanted:
            parts = [_part(shard, source) for source in entry.sources]
            state[entry.name] = _merge(parts, entry, kv_groups)
    return state


def from_megatron(
    state: Weights, family: ModelFamily, kv_groups: int, head_dim: int, wanted: Iterable[str]
) -> dict[str, Tensor]:
    """The inverse of :func:`to_megatron`; ``wanted``: the Hugging Face names that the checkpoint has."""
    wanted = set(wanted)
    shard = {entry.source: state[entry.name] for entry in family.branch_tensors if entry.name in state}
    for entry in _entries(family, wanted):
        if wanted.intersection(entry.sources):
            parts = _split(state[entry.name], entry, kv_groups, head_dim)
            shard |= {s: p for s, p in zip(entry.sources, parts, strict=True) if s in wanted}
    return shard


def _entries(family: ModelFamily, names: Iterable[str]) -> tuple[MegatronTensor, ...]:
    """The family's table for the experts that ``names`` speak of."""
    numbers = {expert_number(name) for name in names} - {None}
    return family.tables.of_experts(sorted(n for n in numbers if n is not None)).megatron


def _part(shard: Weights, source: str) -> Tensor:
    if source in shard or not source.endswith(".bias"):
        return shard[source]
    weight = shard[source.removesuffix("bias") + "weight"]
    return weight.new_zeros(weight.shape[0])


def _merge(parts: list[Tensor], entry: MegatronTensor, kv_groups: int) -> Tensor:
    if entry.layout == "copy":
        return parts[0]
    if entry.layout == "stack":
        return torch.cat(parts)
    grouped = [p.reshape(kv_groups, -1, *p.shape[1:]) for p in parts]
    return torch.cat(grouped, 1).flatten(0, 1)


def _split(tensor: Tensor, entry: MegatronTensor, kv_groups: int, head_dim: int) -> list[Tensor]:
    if entry.layout == "copy":
        return [tensor]
    if entry.layout == "stack":
        return list(tensor.chunk(len(entry.sources)))
    grouped = tensor.reshape(kv_groups, -1, *tensor.shape[1:])
    sizes = [grouped.shape[1] - 2 * head_dim, head_dim, head_dim]
    return [part.flatten(0, 1) for part in grouped.split(sizes, 1)]
