"""Moving heads and neurons of a block to other branches, by permuting its weights.

In a tensor-parallel block the order of key/value groups and of MLP neurons does not matter: each sublayer
sums over them. In an SPD block it says which branch holds what (method section 4), so it is part of the plan,
and the plan alone reproduces it: ``order[j]`` is the original index of what now stands in place ``j``. Shapes
do not change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from megatron_spd.checkpoint.hf import CheckpointReader
from megatron_spd.models.family import ModelFamily
from megatron_spd.models.tables import Unit
from megatron_spd.models.weights import initial_branch_tensors
from megatron_spd.plan import BaseModel, SPDPlan


def permute_block(
    weights: Mapping[str, Tensor],
    family: ModelFamily,
    base: BaseModel,
    head_dim: int,
    kv_group_order: Sequence[int] | None,
    neuron_order: Sequence[int] | None,
) -> dict[str, Tensor]:
    """The block with its key/value groups and MLP neurons in another order.

    Args:
        weights: block-relative Hugging Face names to full (unsharded) tensors; biases move with their rows.
        head_dim: rows of one head.
        kv_group_order: permutation of the ``num_key_value_heads`` groups; a group takes its
            ``num_attention_heads / num_key_value_heads`` consecutive query heads along. None: untouched.
        neuron_order: permutation of the ``intermediate_size`` neurons. None: untouched.

    Returns:
        A new dict. Tensors that the orders do not touch are the given ones, not copies. A branch tensor [G, h]
        (shift, norm weight or bias) belongs to a branch, not to what the branch holds, and is passed on as it is.

    Raises:
        ValueError: an order is not a permutation, or a tensor does not have the size its table entry implies.
        KeyError: a name that the family's table does not have.
    """
    groups, neurons = base.num_key_value_heads, base.intermediate_size
    orders = {"kv": kv_group_order, "query": kv_group_order, "neuron": neuron_order}
    if kv_group_order is not None:
        _check_order(kv_group_order, groups, "key/value groups")
    if neuron_order is not None:
        _check_order(neuron_order, neurons, "MLP neurons")
    # How many consecutive rows move together.
    widths: dict[Unit, int] = {
        "kv": head_dim,
        "query": head_dim * (base.num_attention_heads // groups),
        "neuron": 1,
    }

    permuted = {}
    for name, tensor in weights.items():
        entry = family.tensor(name)
        order = orders.get(entry.unit) if entry.unit is not None else None
        if order is None or entry.dim is None or entry.unit is None:
            permuted[name] = tensor
            continue
        width = widths[entry.unit]
        if tensor.shape[entry.dim] != len(order) * width:
            shape, size = list(tensor.shape), f"{len(order)} x {width}"
            raise ValueError(f"{name} has shape {shape}; expected {size} along axis {entry.dim}")
        index = _expand(order, width).to(tensor.device)
        permuted[name] = tensor.index_select(entry.dim, index)
    return permuted


def planned_weights(reader: CheckpointReader, plan: SPDPlan) -> Callable[[int], Mapping[str, Tensor]]:
    """Block weights of the base model in the plan's permuted order, with the plan's branch norms at their start."""

    def weights(block: int) -> Mapping[str, Tensor]:
        extra = plan.blocks[block]
        permuted = permute_block(
            reader.block(block),
            reader.family,
            plan.base_model,
            reader.head_dim,
            extra.kv_group_order,
            extra.neuron_order,
        )
        dtype = next(iter(permuted.values())).dtype
        hidden = plan.base_model.hidden_size
        return permuted | initial_branch_tensors(extra, reader.family, plan.branches, hidden, dtype)

    return weights


def inverse_order(order: Sequence[int]) -> list[int]:
    """The order that undoes ``order``: applying one after the other restores the original."""
    inverse = [0] * len(order)
    for place, original in enumerate(order):
        inverse[original] = place
    return inverse


def _check_order(order: Sequence[int], n: int, what: str) -> None:
    if sorted(order) != list(range(n)):
        raise ValueError(f"an order of {len(order)} {what} that is not a permutation of 0..{n - 1}")


def _expand(order: Sequence[int], width: int) -> Tensor:
    """Row indices [n * width] for an order [n] of pieces of ``width`` rows."""
    starts = torch.tensor(list(order), dtype=torch.long) * width
    return (starts[:, None] + torch.arange(width)).flatten()
