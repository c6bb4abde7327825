"""KL divergence of two models' next-token distributions, with the vocabulary split over the ranks.

The output layer is the same for both and is not trained. So the loss takes hidden states, makes the logits of a few
positions at a time, and has their gradient at once: no more than :data:`ROWS` positions of logits are ever in
memory.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_spd.comm.all_reduce import all_reduce

#: Positions whose logits are in memory at a time.
ROWS = 128


def vocabulary_parallel_kl(
    student: Tensor, teacher: Tensor, table: Tensor, group: dist.ProcessGroup
) -> Tensor:
    """Mean over positions of ``KL(teacher || student)`` in nats: a scalar in float32 (float64 for such inputs), the
    same on every rank of ``group``.

    ``student``, ``teacher`` [s, b, h]: hidden states behind the final norm, the same on every rank. ``table``: this
    rank's rows of the output layer [v, h], without rows that only pad the vocabulary. The gradient goes into
    ``student`` alone; it is summed over the ranks.
    """
    return _VocabularyParallelKL.apply(student, teacher.detach(), table.detach(), group)


class _VocabularyParallelKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, table: Tensor, group: dist.ProcessGroup
    ) -> Tensor:
        wide = torch.promote_types(student.dtype, torch.float32)
        rows = student.reshape(-1, student.shape[-1])
        total = torch.zeros((), dtype=wide, device=student.device)
        gradients = []
        for mine, theirs in zip(rows.split(ROWS), teacher.reshape(rows.shape).split(ROWS), strict=True):
            logits = torch.cat([mine, theirs]) @ table.T
            log_q, log_p = _log_softmax(logits.to(wide).view(2, len(mine), -1), group)
            p = log_p.exp()
            total += torch.linalg.vecdot(p, log_p - log_q).sum()
            if ctx.needs_input_grad[0]:
                # d KL / d logits = q - p.
                gradients.append((log_q.exp_().sub_(p) / len(rows)).to(table.dtype) @ table)
        ctx.group = group
        ctx.save_for_backward(torch.cat(gradients).view_as(student) if gradients else None)
        return all_reduce(total, group) / len(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return all_reduce(gradient * grads[0].to(gradient.dtype), ctx.group), None, None, None


def _log_softmax(logits: Tensor, group: dist.ProcessGroup) -> Tensor:
    """``logits`` [2, t, v] less the logarithm of their sum of exponentials over all ranks' entries. Works in
    place."""
    sums = logits.logsumexp(-1)
    if group.size() > 1:
        greatest = sums.clone()
        dist.all_reduce(greatest, dist.ReduceOp.MAX, group=group)
        sums = all_reduce((sums - greatest).exp_(), group).log_() + greatest
    return logits.sub_(sums[..., None])
