"""The conjugate pairs of the sync-point rule (method section 9): what is summed forward, what backward.

A *segment* is the run of sublayers between two kept sync points. Inside it, every rank uses the synced residual X in
another function, so on each rank the gradient of everything replicated is a partial sum. Three functions keep that
exact with one collective each way:

- :func:`enter_segment`: identity forward, all-reduce backward; X passes through it once per segment.
- :func:`leave_segment`: ``X + all_reduce(pending)``. Its gradient into X belongs to no rank in particular; it
  is given to the first rank alone, so that the all-reduce at the segment's entry counts it exactly once, without a
  rounding error. The all-reduce may be a low-bit one.
- :func:`sum_within`: all-reduce both ways, for the ranks that share a branch (``branches.py``).
- :func:`share_parameters`: replicated parameters that ranks use differently (norms, biases used before a sync):
  identity forward, one coalesced all-reduce backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_spd.collective import CollectiveFormat
from megatron_spd.comm.all_reduce import all_reduce, all_reduce_coalesced
from megatron_spd.comm.lowbit import lowbit_all_reduce, simulate_lowbit


class _EnterSegment(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        # The incoming buffer may be shared with another consumer of the same gradient: reduce a copy.
        return all_reduce(grads[0].clone(memory_format=torch.contiguous_format), ctx.group), None


class _LeaveSegment(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        pending: Tensor,
        group: dist.ProcessGroup,
        collective: CollectiveFormat | None,
    ) -> Tensor:
        ctx.owns_residual = group.rank() == 0
        if collective is None:
            return x + all_reduce(pending, group)
        return x + lowbit_all_reduce(pending, collective, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        return grads[0] if ctx.owns_residual else None, grads[0], None, None


class _SumWithin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return all_reduce(partial.view_as(partial), group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grads[0].clone(memory_format=torch.contiguous_format), ctx.group), None


class _SumLowBit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partials: Tensor, collective: CollectiveFormat) -> Tensor:
        ctx.branches = len(partials)
        return simulate_lowbit(partials, collective)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].expand(ctx.branches, *grads[0].shape), None


class _ShareParameters(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return tuple(p.view_as(p) for p in parameters)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *all_reduce_coalesced(list(grads), ctx.group))


def enter_segment(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """``x`` [s, b, h] for use inside a segment; its gradient is summed over ``group`` (method section 9)."""
    return x if group.size() == 1 else _EnterSegment.apply(x, group)


def leave_segment(
    x: Tensor, pending: Tensor, group: dist.ProcessGroup, collective: CollectiveFormat | None = None
) -> Tensor:
    """``x + all_reduce(pending)``, both [s, b, h]; ``x`` must come from :func:`enter_segment`.

    ``pending`` is consumed: its memory may hold the sum afterwards. ``collective``: the format of a low-bit all-reduce
    (None: a full one). Its rounding has the gradient 1: backward it is the plain conjugate.
    """
    if group.size() == 1:
        return x + pending
    return _LeaveSegment.apply(x, pending, group, collective)


def sum_within(partial: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of ``partial`` (any shape) over the ranks of ``group``, each of which uses it in another function: the
    gradient that arrives is a partial sum and is summed over ``group`` as well. ``partial`` is consumed."""
    return partial if group.size() == 1 else _SumWithin.apply(partial, group)


def sum_low_bit(partials: Tensor, collective: CollectiveFormat) -> Tensor:
    """The sum [...] of the branches ``partials`` [G, ...] of one process as G ranks would get it by a low-bit
    all-reduce; its gradient is that of the plain sum."""
    return _SumLowBit.apply(partials, collective)


def share_parameters(parameters: Sequence[Tensor], group: dist.ProcessGroup) -> tuple[Tensor, ...]:
    """Replicated ``parameters`` for rank-different use; their gradients are summed over ``group`` in one collective."""
    if group.size() == 1 or not torch.is_grad_enabled() or not any(p.requires_grad for p in parameters):
        return tuple(parameters)
    return _ShareParameters.apply(group, *parameters)
