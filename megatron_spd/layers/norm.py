"""Norms under sequence parallelism, and the gradients that are partial there."""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_spd.comm.all_reduce import all_reduce

#: Megatron-core's mark of a replicated parameter whose gradient is a partial sum over the tensor-parallel ranks.
_PARTIAL = "sequence_parallel"


class MarkedTorchNorm:
    """Megatron-core's PyTorch norm for sequence parallelism.

    ``WrappedTorchNorm`` refuses it because nothing would sum the gradients of its weights. Here they carry the mark by
    which Megatron-core's ``finalize_model_grads`` knows that it has to.
    """

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> Any:
        """A ``torch.nn`` norm over ``hidden_size`` channels, its parameters marked."""
        accepted = copy.copy(config)
        accepted.sequence_parallel = False
        norm = WrappedTorchNorm(config=accepted, hidden_size=hidden_size, eps=eps)
        for parameter in norm.parameters():
            setattr(parameter, _PARTIAL, True)
        return norm


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
