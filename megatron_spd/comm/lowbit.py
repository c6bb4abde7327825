"""The two-step low-bit all-reduce (the Flash Communication paper, method section 5).

Every rank quantises its tensor in one chunk per rank; the ranks exchange chunks; each sums its own in
float32, quantises the sum, and all ranks gather the sums. Groups of values are quantised by themselves, so the result
does not depend on how chunks are cut, and since every rank reads the same bytes it is the same on all of them.

Error: each of the M messages that are summed is off by at most half a step of its group, the sum by half of its own
step more. The other cost is time: two collectives and the packing, which a small message does not earn back.
"""

from __future__ import annotations

import functools
from importlib.util import find_spec
from types import ModuleType

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_spd.collective import CollectiveFormat
from megatron_spd.comm import quantize
from megatron_spd.comm.all_reduce import all_reduce

#: Bytes of a tensor below which a plain all-reduce is used: on a link of 0.25 Gbit/s both take the same time there, on
#: one of 1 Gbit/s at four times as much (`megatron-spd collectives --link-rates 0.25,1`).
PLAIN_BELOW = 64 * 1024

#: The function of torch.distributed for the second step; PyTorch 2.13 renamed it and warns of the old name.
GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"


def lowbit_all_reduce(
    tensor: Tensor, fmt: CollectiveFormat, group: dist.ProcessGroup, plain_below: int = PLAIN_BELOW
) -> Tensor:
    """The sum of ``tensor`` (any shape and layout, fp32, bf16 or fp16) over ``group`` by low-bit messages.

    Out of place, in the tensor's shape and dtype, contiguous; the argument itself where the group has one rank. A
    tensor of less than ``plain_below`` bytes goes through a plain all-reduce. All ranks must pass the same number of
    values. Groups of values in which a rank holds NaN or infinity come back as NaN or infinity (see ``quantize.py``).
    """
    ranks = group.size()
    if ranks == 1 or tensor.numel() == 0:
        return tensor
    if tensor.numel() * tensor.element_size() < plain_below:
        return all_reduce(tensor.clone(memory_format=torch.contiguous_format), group)
    steps = _operations(tensor.device.type)
    chunk = fmt.chunk(tensor.numel(), ranks)
    sent = steps.quantise(_padded(tensor.reshape(-1), ranks * chunk).view(ranks, chunk), fmt.scatter)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    mine = steps.requantised_sum(received, chunk, fmt.scatter, fmt.gather)
    sums = mine.new_empty(ranks, mine.shape[1])
    getattr(dist, GATHER)(sums, mine, group=group)
    result = steps.dequantise(sums, chunk, fmt.gather).view(-1)
    return result[: tensor.numel()].view(tensor.shape).to(tensor.dtype)


def simulate_lowbit(partials: Tensor, fmt: CollectiveFormat) -> Tensor:
    """What :func:`lowbit_all_reduce` (without its threshold) gives G ranks that hold ``partials`` [G, ...], bit for
    bit, computed in one process: [...]."""
    if len(partials) == 1 or partials.numel() == 0:
        return partials.sum(0)
    steps = _operations(partials.device.type)
    flat = partials.flatten(1) if partials.dim() > 1 else partials[:, None]
    chunk = fmt.chunk(flat.shape[1], 1)
    wire = steps.quantise(_padded(flat, chunk), fmt.scatter)
    total = steps.requantised_sum(wire, chunk, fmt.scatter, fmt.gather)
    result = steps.dequantise(total, chunk, fmt.gather).view(-1)
    return result[: flat.shape[1]].view(partials.shape[1:]).to(partials.dtype)


def exchanged_bytes(numel: int, ranks: int, fmt: CollectiveFormat) -> int:
    """Bytes that a rank sends for ``numel`` values: a chunk to each other rank, and its sum to each."""
    chunk = fmt.chunk(numel, ranks)
    return (ranks - 1) * (fmt.scatter.wire_bytes(chunk) + fmt.gather.wire_bytes(chunk))


def _padded(values: Tensor, n: int) -> Tensor:
    """``values`` with zeros behind them up to ``n`` in the last dimension."""
    missing = n - values.shape[-1]
    return F.pad(values, (0, missing)) if missing else values


@functools.cache
def _operations(device: str) -> ModuleType:
    """The module that quantises on a type of device, all with the same bytes: kernels by Triton on a GPU, by Numba on
    the CPU, where these are installed, else plain PyTorch."""
    if device == "cuda" and find_spec("triton") is not None:
        from megatron_spd.comm import kernels

        return kernels
    if device == "cpu" and find_spec("numba") is not None:
        from megatron_spd.comm import cpu_kernels

        return cpu_kernels
    return quantize
