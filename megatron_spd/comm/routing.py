"""One routing decision for all ranks of a group."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_spd.comm.all_reduce import all_reduce

#: Bytes of an expert's number among what is sent.
_INDEX_BYTES = 2


def routing_bytes(tokens: int, chosen: int, weight_bytes: int) -> int:
    """Bytes that :func:`broadcast_routing` sends for ``tokens`` tokens with ``chosen`` experts each, by weights of
    ``weight_bytes`` bytes."""
    return tokens * chosen * (weight_bytes + _INDEX_BYTES)


class _BroadcastRouting(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weights: Tensor, experts: Tensor, group: dist.ProcessGroup
    ) -> tuple[Tensor, Tensor]:
        ctx.group = group
        parts = (weights.contiguous().view(torch.uint8), experts.to(torch.int16).view(torch.uint8))
        message = torch.cat(parts, 1)
        dist.broadcast(message, dist.get_global_rank(group, 0), group)
        sent_weights, sent_experts = message.split([part.shape[1] for part in parts], 1)
        experts = sent_experts.contiguous().view(torch.int16).to(experts.dtype)
        ctx.mark_non_differentiable(experts)
        return sent_weights.contiguous().view(weights.dtype), experts

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        total = all_reduce(grads[0].clone(memory_format=torch.contiguous_format), ctx.group)
        return total if ctx.group.rank() == 0 else torch.zeros_like(total), None, None


def broadcast_routing(weights: Tensor, experts: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """``weights`` [t, k] and numbers ``experts`` [t, k] (below 2^15) of the first rank, on every rank of ``group``.

    One broadcast of :func:`routing_bytes`. Backward, one all-reduce of [t, k]: the gradients of all ranks belong to the
    first one's weights.
    """
    return (weights, experts) if group.size() == 1 else _BroadcastRouting.apply(weights, experts, group)
