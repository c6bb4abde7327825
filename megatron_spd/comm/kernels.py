"""The steps of the low-bit all-reduce as fused Triton kernels: the twins of ``quantize.py`` for CUDA tensors.

One kernel reads values, quantises and packs them; one unpacks messages and sums them, and packs the sum again where it
is to be sent on. Formulas, bytes and their order are those of ``quantize.py``; a test holds the two together under
Triton's interpreter. No GPU has run them: their speed is unknown, and a compiler that fuses the multiplication
and the addition of the rounding may give the neighbouring code to a value that lies between two codes.

Imported on first use with a CUDA tensor: Triton comes with PyTorch's CUDA build.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_spd.collective import Quantisation
from megatron_spd.comm.quantize import LEAST_STEP, empty_messages

#: Values of a program: at least one group of the largest size.
_TILE = tl.constexpr(1024)
_LEAST_STEP = tl.constexpr(LEAST_STEP)
_GREATEST = tl.constexpr(torch.finfo(torch.float32).max)


def quantise(values: Tensor, fmt: Quantisation) -> Tensor:
    """As :func:`megatron_spd.comm.quantize.quantise`."""
    rows, n = values.shape
    wire = empty_messages(rows, n, fmt, values.device)
    grid = (triton.cdiv(n, _TILE.value), rows)
    _quantise_kernel[grid](
        values.contiguous(), wire, wire.view(torch.bfloat16), n, wire.shape[1], fmt.bits, fmt.group
    )
    return wire


def dequantise(wire: Tensor, n: int, fmt: Quantisation) -> Tensor:
    """As :func:`megatron_spd.comm.quantize.dequantise`."""
    values = torch.empty(len(wire), n, device=wire.device)
    _unpack(wire, n, fmt, None, 1, values)
    return values


def requantised_sum(wire: Tensor, n: int, scatter: Quantisation, gather: Quantisation) -> Tensor:
    """As :func:`megatron_spd.comm.quantize.requantised_sum`."""
    message = empty_messages(1, n, gather, wire.device)
    _unpack(wire, n, scatter, gather, len(wire), message)
    return message


def _unpack(
    wire: Tensor, n: int, fmt: Quantisation, gather: Quantisation | None, summed: int, out: Tensor
) -> None:
    """Sum every ``summed`` messages of ``wire``; ``out``: the sums [r / summed, n], or their messages by ``gather``."""
    packed = gather is not None
    grid = (triton.cdiv(n, _TILE.value), len(wire) // summed)
    _unpack_kernel[grid](
        wire,
        wire.view(torch.bfloat16),
        out,
        out.view(torch.bfloat16) if packed else out,
        n,
        wire.shape[1],
        out.shape[1],
        summed,
        fmt.bits,
        fmt.group,
        gather.bits if gather is not None else 0,
        gather.group if gather is not None else 0,
    )


@triton.jit
def _round_down(x):
    """Float32 rounded down to a number of bfloat16."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + ((bits >> 31) & 0xFFFF)) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _round_up(x):
    """Float32 >= 0 rounded up to a number of bfloat16."""
    return ((x.to(tl.int32, bitcast=True) + 0xFFFF) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _round_nearest(x):
    """Float32 rounded to the nearest number of bfloat16, ties to even (the interpreter's own cast cuts off)."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _pack(x, row, halves, first, groups, BITS: tl.constexpr, GROUP: tl.constexpr):
    """Write the values ``x`` [k, GROUP] as groups ``first``... of the message of ``groups`` groups at ``row``.

    ``row``, ``halves``: the message as bytes and as bfloat16. See ``quantize._encode``.
    """
    COUNT: tl.constexpr = _TILE // GROUP
    group = first + tl.arange(0, COUNT)
    inside = group < groups
    smallest = tl.min(x, 1)
    largest = tl.max(x, 1)
    # The reductions may pass over NaN.
    finite = (tl.min((tl.abs(x) <= _GREATEST).to(tl.int32), 1) == 1) & (largest - smallest <= _GREATEST)
    poison = tl.where(finite, 0.0, float("nan"))
    place = tl.arange(0, GROUP)[None, :]
    low = tl.min(tl.where(x == smallest[:, None], place, GROUP - 1), 1)
    high = tl.min(tl.where(x == largest[:, None], place, GROUP - 1), 1)
    tl.store(halves + 2 * groups + group, (_round_nearest(smallest) + poison).to(tl.bfloat16), inside)
    tl.store(halves + 3 * groups + group, (_round_nearest(largest) + poison).to(tl.bfloat16), inside)
    positions = row + groups * (8 + GROUP * BITS // 8)
    tl.store(positions + group, low.to(tl.uint8), inside)
    tl.store(positions + groups + group, high.to(tl.uint8), inside)
    spike = (place == low[:, None]) | (place == high[:, None])
    smallest = tl.min(tl.where(spike, float("inf"), x), 1)
    x = tl.where(spike, smallest[:, None], x)
    largest = tl.max(x, 1)
    zero = _round_down(smallest) + poison
    LEVELS: tl.constexpr = (1 << BITS) - 1
    step = _round_up(tl.div_rn(largest - zero, tl.full([COUNT], LEVELS, tl.float32)))
    step = tl.maximum(step, _LEAST_STEP)
    tl.store(halves + group, zero.to(tl.bfloat16), inside)
    tl.store(halves + groups + group, step.to(tl.bfloat16), inside)
    inverse = tl.div_rn(tl.full([COUNT], 1.0, tl.float32), step)
    scaled = (x - zero[:, None]) * inverse[:, None] + 0.5
    codes = tl.where(finite[:, None], scaled, 0.0).to(tl.int32)
    # The planes of a width are its binary digits, the widest plane with the lowest bits.
    for power in tl.static_range(3, -1, -1):
        if BITS & (1 << power):
            BELOW: tl.constexpr = BITS & ~((2 << power) - 1)
            PIECES: tl.constexpr = 8 >> power
            SIZE: tl.constexpr = GROUP // PIECES
            part = (codes >> BELOW) & ((1 << (1 << power)) - 1)
            part = tl.reshape(part, [COUNT, PIECES, SIZE])
            shift = tl.arange(0, PIECES) << power
            packed = tl.sum(part << shift[None, :, None], 1).to(tl.uint8)
            plane = row + groups * (8 + GROUP * BELOW // 8)
            place_in_plane = group[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
            tl.store(plane + place_in_plane, packed, inside[:, None])


@triton.jit
def _values(row, halves, first, groups, BITS: tl.constexpr, GROUP: tl.constexpr):
    """The values [k, GROUP] of the groups ``first``... of a message; see ``quantize._decode``."""
    COUNT: tl.constexpr = _TILE // GROUP
    group = first + tl.arange(0, COUNT)
    inside = group < groups
    codes = tl.zeros([COUNT, GROUP], tl.int32)
    for power in tl.static_range(3, -1, -1):
        if BITS & (1 << power):
            BELOW: tl.constexpr = BITS & ~((2 << power) - 1)
            PIECES: tl.constexpr = 8 >> power
            SIZE: tl.constexpr = GROUP // PIECES
            plane = row + groups * (8 + GROUP * BELOW // 8)
            place_in_plane = group[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
            packed = tl.load(plane + place_in_plane, inside[:, None], 0).to(tl.int32)
            shift = tl.arange(0, PIECES) << power
            part = (packed[:, None, :] >> shift[None, :, None]) & ((1 << (1 << power)) - 1)
            codes += tl.reshape(part, [COUNT, GROUP]) << BELOW
    zero = tl.load(halves + group, inside, 0.0).to(tl.float32)
    step = tl.load(halves + groups + group, inside, 0.0).to(tl.float32)
    # The product is exact, so fusing it into the sum changes nothing.
    x = codes.to(tl.float32) * step[:, None] + zero[:, None]
    smallest = tl.load(halves + 2 * groups + group, inside, 0.0).to(tl.float32)
    largest = tl.load(halves + 3 * groups + group, inside, 0.0).to(tl.float32)
    positions = row + groups * (8 + GROUP * BITS // 8)
    low = tl.load(positions + group, inside, 0).to(tl.int32)
    high = tl.load(positions + groups + group, inside, 0).to(tl.int32)
    place = tl.arange(0, GROUP)[None, :]
    x = tl.where(place == low[:, None], smallest[:, None], x)
    x = tl.where(place == high[:, None], largest[:, None], x)
    return x


@triton.jit
def _quantise_kernel(values, wire, halves, n, row_bytes, BITS: tl.constexpr, GROUP: tl.constexpr):
    """Program (t, r) packs the t-th tile of row r of ``values`` [r, n]."""
    row = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * (_TILE // GROUP)
    place = first * GROUP + tl.arange(0, _TILE)
    x = tl.load(values + row * n + place, place < n, 0.0).to(tl.float32)
    x = tl.reshape(x, [_TILE // GROUP, GROUP])
    start = row * row_bytes
    _pack(x, wire + start, halves + start // 2, first, n // GROUP, BITS, GROUP)


@triton.jit
def _unpack_kernel(
    wire,
    halves,
    out,
    out_halves,
    n,
    row_bytes,
    out_row,
    summed,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    OUT_BITS: tl.constexpr,
    OUT_GROUP: tl.constexpr,
):
    """Program (t, r) sums the t-th tile of the messages r * summed ... (r + 1) * summed - 1, and packs the sum again
    if OUT_BITS is not 0. ``out_row``: elements of a row of ``out``."""
    row = tl.program_id(1).to(tl.int64)
    tile = tl.program_id(0)
    total = tl.zeros([_TILE // GROUP, GROUP], tl.float32)
    for message in range(summed):
        start = (row * summed + message) * row_bytes
        total += _values(wire + start, halves + start // 2, tile * (_TILE // GROUP), n // GROUP, BITS, GROUP)
    if OUT_BITS:
        total = tl.reshape(total, [_TILE // OUT_GROUP, OUT_GROUP])
        first = tile * (_TILE // OUT_GROUP)
        start = row * out_row
        _pack(total, out + start, out_halves + start // 2, first, n // OUT_GROUP, OUT_BITS, OUT_GROUP)
    else:
        place = tile * _TILE + tl.arange(0, _TILE)
        tl.store(out + row * out_row + place, tl.reshape(total, [_TILE]), place < n)
