"""The norm of query and key heads (Qwen3): replicated, but every rank applies it to its own heads."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from megatron_spd.comm.autograd import share_parameters


class HeadNorm(nn.RMSNorm):
    """RMSNorm over the channels of a head, its gradient summed over the tensor-parallel ranks.

    Megatron-core's own norm leaves each rank with the gradient of its heads (its training loop sums them only under
    sequence parallelism), so that replicas would drift apart. For blocks with and without dropped points.
    """

    def __init__(
        self, config: Any, hidden_size: int, eps: float, group: dist.ProcessGroup | None = None, **_: Any
    ) -> None:
        super().__init__(hidden_size, eps)
        self._group = group or parallel_state.get_tensor_model_parallel_group()

    def forward(self, x: Tensor) -> Tensor:
        """[s, b, heads, d] -> the same."""
        (weight,) = share_parameters([self.weight], self._group)
        return nn.functional.rms_norm(x, self.normalized_shape, weight, self.eps)
