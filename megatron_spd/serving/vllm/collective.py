"""The all-reduce of a kept sync point on vLLM's tensor-parallel group.

A low-bit collective is about what is sent. On one rank nothing is sent, so there a low-bit point is exact, as in the
exported transformers model; `megatron-spd evaluate` in contrast computes on one device what G ranks would get. With
1 < M < G a rank sums its branches before it quantises, so that numbers depend on M.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from vllm.distributed import get_tp_group, tensor_model_parallel_all_reduce
from vllm.utils.torch_utils import direct_register_custom_op

from megatron_spd.plan import FULL


def all_reduce_of(collective: str) -> Callable[[Tensor], Tensor]:
    """The all-reduce that a plan names ``collective``: "full", or a low-bit format. It may overwrite its input."""
    if collective == FULL or get_tp_group().world_size == 1:
        return tensor_model_parallel_all_reduce
    return functools.partial(_lowbit_operators().lowbit_all_reduce, collective=collective)


@functools.cache
def _lowbit_operators() -> Any:
    """The namespace of operators with ``lowbit_all_reduce(tensor, collective)``, which torch.compile takes whole."""
    from megatron_spd.collective import CollectiveFormat
    from megatron_spd.comm.lowbit import PLAIN_BELOW, lowbit_all_reduce

    def reduced(tensor: Tensor, collective: str) -> Tensor:
        group = get_tp_group()
        if tensor.numel() * tensor.element_size() < PLAIN_BELOW:
            # vLLM's own all-reduce, made for small messages; a copy, because an operator must not return its input.
            return group.all_reduce(tensor.clone())
        fmt = CollectiveFormat.parse(collective)
        return lowbit_all_reduce(tensor, fmt, group.device_group, plain_below=0)

    def shape(tensor: Tensor, collective: str) -> Tensor:
        return torch.empty_like(tensor)

    for function in reduced, shape:
        # PyTorch reads the operator's schema from types, not from the text that annotations are in this file.
        function.__annotations__ = {"tensor": Tensor, "collective": str, "return": Tensor}
    direct_register_custom_op("lowbit_all_reduce", reduced, fake_impl=shape, target_lib=_library())
    return torch.ops.megatron_spd


@functools.cache
def _library() -> torch.library.Library:
    """Kept by the cache: operators go when their library does."""
    return torch.library.Library("megatron_spd", "FRAGMENT")
