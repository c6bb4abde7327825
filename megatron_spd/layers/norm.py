"""Norms whose gradients are partial: of query and key heads, and all of them under sequence parallelism."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_spd.comm.all_reduce import all_reduce
from megatron_spd.comm.autograd import share_parameters

#: Megatron-core's mark of a replicated parameter whose gradient is a partial sum over the tensor-parallel ranks.
_PARTIAL = "sequence_parallel"
#: Its mark of a replicated parameter whose gradient is averaged over these ranks, whatever its name.
_WHOLE = "average_gradients_across_tp_domain"


class MarkedTorchNorm:
    """Megatron-core's PyTorch norm where ``WrappedTorchNorm`` refuses the config.

    Sequence parallelism, because nothing would sum the gradients of its weights: here they carry the mark by which
    Megatron-core's ``finalize_model_grads`` knows that it has to. ``persist_layer_norm``, Megatron-LM's default: it
    names a kernel that PyTorch's norms do not have; they compute the same without it.
    """

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> Any:
        """A ``torch.nn`` norm over ``hidden_size`` channels, its parameters marked under sequence parallelism."""
        accepted = copy.copy(config)
        accepted.sequence_parallel = accepted.persist_layer_norm = False
        norm = WrappedTorchNorm(config=accepted, hidden_size=hidden_size, eps=eps)
        for parameter in norm.parameters():
            setattr(parameter, _PARTIAL, config.sequence_parallel)
        return norm


class HeadNorm(nn.RMSNorm):
    """RMSNorm over the channels of a head, its gradient summed over the tensor-parallel ranks.

    Megatron-core's own norm leaves each rank with the gradient of its heads, for ``finalize_model_grads`` to sum; under
    other optimizers replicas would drift apart. Here every optimizer finds the sum, and the weight carries the mark by
    which ``finalize_model_grads`` averages it over the ranks (which changes nothing) instead. For blocks with and
    without dropped points.
    """

    def __init__(
        self, config: Any, hidden_size: int, eps: float, group: dist.ProcessGroup | None = None, **_: Any
    ) -> None:
        super().__init__(hidden_size, eps)
        setattr(self.weight, _WHOLE, True)
        self._group = group or parallel_state.get_tensor_model_parallel_group()

    def forward(self, x: Tensor) -> Tensor:
        """[s, b, heads, d] -> the same."""
        (weight,) = share_parameters([self.weight], self._group)
        return nn.functional.rms_norm(x, self.normalized_shape, weight, self.eps)


def sum_gradients_in_backward(model: nn.Module, group: ProcessGroup) -> None:
    """Make every backward pass of a sequence-parallel ``model`` end with whole gradients: those of marked parameters
    (norms, output biases) are summed over the tensor-parallel ``group`` as they arise.

    For optimizers that know nothing of Megatron-core's marks (DeepSpeed's, PyTorch's): once, when the model is built.
    With Megatron-core's ``finalize_model_grads`` leave it out: that sums them in one collective per step. The
    marks are removed, so that nothing sums them twice.
    """

    def summed(gradient: Tensor) -> Tensor:
        return all_reduce(gradient.clone(memory_format=torch.contiguous_format), group)

    for parameter in model.parameters():
        if getattr(parameter, _PARTIAL, False):
            parameter.register_hook(summed)
            setattr(parameter, _PARTIAL, False)
