"""Megatron-core's parallel linears, for inputs and outputs that differ from branch to branch.

Parameters, their sharding, initialisation, checkpoints and the matrix multiply are Megatron-core's own. What differs:
no collective in either direction (the layer in ``block.py`` owns those), and a leading axis of the rank's
local branches. With one local branch (M = G) the forward is Megatron-core's own forward.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor


class BranchColumnParallelLinear(ColumnParallelLinear):
    """Column-parallel linear whose input may differ between the rank's branches.

    ``local_branches``: B = G / M. The output axis of the rank's weight is ``stride`` parts (gate and up of a
    gated MLP), each of B equal runs of rows, one for a branch.
    """

    def __init__(self, *args: Any, local_branches: int, stride: int = 1, **kwargs: Any) -> None:
        # The gradient of the input is summed once per segment, not once per linear.
        super().__init__(*args, stride=stride, disable_grad_reduce=True, **kwargs)
        # Nor is its input gathered here: the segment has done it.
        self.sequence_parallel = False
        self.local_branches = local_branches
        self.parts = stride

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """[1 or B, s, b, h] -> [s, b, out / M] in the order of the rank's weight rows; a leading 1 means that all
        branches see the same input."""
        if input_.shape[0] == 1:
            return super().forward(input_[0], *args, **kwargs)
        runs = self.weight.view(self.parts, self.local_branches, -1, self.weight.shape[-1])
        products = [_matmul(self, z, w) for part in runs for z, w in zip(input_, part, strict=True)]
        output = torch.cat(products, dim=-1)
        if self.bias is None:
            return output, None
        return (output, self.bias) if self.skip_bias_add else (output + self.bias, None)

    def branch_forward(self, x: Tensor, g: int) -> Tensor:
        """``x`` [n, in] -> [n, out / G]: the part of the rank's ``g``-th branch, without bias."""
        if self.local_branches == 1:
            return _matmul(self, x, self.weight)
        runs = self.weight.view(self.parts, self.local_branches, -1, self.weight.shape[-1])
        return torch.cat([_matmul(self, x, part[g]) for part in runs], -1)


class PartialRowParallelLinear(RowParallelLinear):
    """Row-parallel linear that returns partial sums instead of reducing them.

    ``per_branch``: keep the rank's B branches apart, [B, s, b, h]; otherwise their sum, [1, s, b, h] (enough where the
    next sync point is kept).
    """

    def __init__(self, *args: Any, local_branches: int, per_branch: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.branches = local_branches
        self.local_branches = local_branches if per_branch else 1

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """[s, b, in / M] -> ([B or 1, s, b, h] partial sums, bias); the bias is not added."""
        if self.local_branches == 1:
            partial = _matmul(self, input_, self.weight).unsqueeze(0)
        else:
            columns = self.weight.shape[1] // self.local_branches
            pairs = zip(input_.split(columns, -1), self.weight.split(columns, 1), strict=True)
            partial = torch.stack([_matmul(self, x, w) for x, w in pairs])
        return partial, self.bias

    def branch_forward(self, x: Tensor, g: int) -> Tensor:
        """``x`` [n, in / G] of the rank's ``g``-th branch -> [n, out], without bias."""
        weight = self.weight if self.branches == 1 else self.weight.chunk(self.branches, 1)[g]
        return _matmul(self, x, weight)


def _matmul(layer: ColumnParallelLinear | RowParallelLinear, x: Tensor, weight: Tensor) -> Tensor:
    """Megatron-core's matrix multiply of ``x`` [s, b, in] with (a part of) the layer's weight, without collectives."""
    return layer._forward_impl(
        input=x,
        weight=weight,
        bias=None,
        # The fused kernel accumulates into the parameter's own buffer, which a part of it does not have.
        gradient_accumulation_fusion=layer.gradient_accumulation_fusion and weight is layer.weight,
        allreduce_dgrad=False,
        sequence_parallel=False,
        tp_group=layer.tp_group,
        grad_output_buffer=None,
    )
