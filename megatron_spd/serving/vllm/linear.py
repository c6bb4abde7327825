"""Matrix multiplies of vLLM's parallel linears where the branches of one rank differ (M < G).

Parameters, their sharding and loading stay vLLM's; only the linear's ``quant_method``, the object that multiplies, is
another one. A rank holds B = G / M branches, each an equal contiguous part of its heads and neurons. With B = 1 no
linear needs this.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import UnquantizedLinearMethod


class _BranchMethod(UnquantizedLinearMethod):
    """Keeps the weight as it was loaded, by rows and columns that can be told apart."""

    def __init__(self, branches: int) -> None:
        super().__init__()
        self.branches = branches

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Nothing is repacked for a kernel."""

    @staticmethod
    def plain_weight(layer: Any) -> Tensor:
        """The weight as a tensor: torch.compile does not trace these operations on vLLM's own parameter class."""
        return layer.weight.data


class BranchInputMethod(_BranchMethod):
    """q, k, v, gate and up: rows of the weight belong to branches, in each of the linear's stacked parts."""

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[T, B * in], one input for each branch -> [T, out], in the order of the weight's rows."""
        x = x.unflatten(-1, (self.branches, -1))
        parts = self.plain_weight(layer).split(layer.output_partition_sizes)
        out = [torch.einsum("tbi,boi->tbo", x, p.unflatten(0, (self.branches, -1))).flatten(1) for p in parts]
        product = torch.cat(out, -1)
        return product if bias is None else product + bias


class BranchOutputMethod(_BranchMethod):
    """o_proj and down_proj: columns of the weight belong to branches."""

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[T, in] -> [T, B * out], each branch's own partial sum. The linear never gives its bias (see ``rule.py``)."""
        x = x.unflatten(-1, (self.branches, -1))
        weight = self.plain_weight(layer).unflatten(1, (self.branches, -1))
        return torch.einsum("tbi,obi->tbo", x, weight).flatten(1)
