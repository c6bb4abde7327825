"""The all-reduce of a kept sync point on vLLM's tensor-parallel group, and that of a dropped one among the ranks of a
branch (M > G).

A low-bit collective is about what is sent. On one rank nothing is sent, so there a low-bit point is exact, as in the
exported transformers model; `megatron-spd evaluate` in contrast computes on one device what G ranks would get. With
1 < M < G a rank sums its branches before it quantises, and with M > G it gives its part of one, so that numbers depend
on M.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from vllm.distributed import get_tp_group, get_world_group, tensor_model_parallel_all_reduce
from vllm.distributed.parallel_state import GroupCoordinator, init_model_parallel_group
from vllm.utils.torch_utils import direct_register_custom_op

from megatron_spd.plan import FULL


def all_reduce_of(collective: str) -> Callable[[Tensor], Tensor]:
    """The all-reduce that a plan names ``collective``: "full", or a low-bit format. It may overwrite its input."""
    if collective == FULL or get_tp_group().world_size == 1:
        return tensor_model_parallel_all_reduce
    return functools.partial(_lowbit_operators().lowbit_all_reduce, collective=collective)


def branch_sum(branches: int) -> Callable[[Tensor], Tensor] | None:
    """The all-reduce among the M / G ranks that share this rank's branch; None for M <= G, where nothing is summed.

    Called by all ranks alike, when layers are built. G must divide M (``SPDPlan.check_ranks``).
    """
    tp = get_tp_group()
    if tp.world_size <= branches:
        return None
    return _branch_group(tp, tp.world_size // branches).all_reduce


@functools.cache
def _branch_group(tp: GroupCoordinator, size: int) -> GroupCoordinator:
    """This rank's group of ``size`` ranks in a row. vLLM's tensor-parallel ranks follow each other, so groups of all
    the world are groups inside each tensor-parallel group, and the ranks of a branch share a node where they fit."""
    world = torch.distributed.get_world_size()
    ranks = [list(range(first, first + size)) for first in range(0, world, size)]
    backend = torch.distributed.get_backend(tp.device_group)
    # By this beginning of the name vLLM knows groups that all-reduce activations: only they get its fast kernels.
    return init_model_parallel_group(ranks, get_world_group().local_rank, backend, group_name="tp_branch")


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
