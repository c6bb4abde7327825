"""What crosses ranks at a kept sync point."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def all_reduce(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of ``tensor`` (any shape, any float dtype) over ``group``.

    Works in place where the memory layout allows it and returns the tensor that holds the sum: the caller must use the
    returned one, and must not read the argument again. (A collective on a non-contiguous tensor acts on a hidden
    copy; returning the argument then would return it unreduced.)
    """
    if group.size() == 1:
        return tensor
    tensor = tensor.contiguous()
    dist.all_reduce(tensor, group=group)
    return tensor


def all_reduce_coalesced(tensors: list[Tensor], group: dist.ProcessGroup) -> list[Tensor]:
    """The sums of several small tensors over ``group`` by one collective. Shapes are kept; dtypes must agree."""
    if group.size() == 1 or not tensors:
        return tensors
    flat = all_reduce(torch.cat([t.reshape(-1) for t in tensors]), group)
    parts = flat.split([t.numel() for t in tensors])
    return [part.view_as(t) for part, t in zip(parts, tensors, strict=True)]
