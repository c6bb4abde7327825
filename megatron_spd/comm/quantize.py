"""Group-wise asymmetric quantisation of flat tensors into bytes, and back (Flash Communication, both papers).

A group's values x become codes q = round((x - zero) / step) of a few bits, and come back as q * step + zero. ``zero``
is the smallest value rounded down to bfloat16, ``step`` the range over the greatest code rounded up to bfloat16, so
that all codes fit and no value is off by more than half a step (and the rounding of float32). The range is that of a
group without its smallest and its largest value, which travel as bfloat16 (spike reserving).

A message of N groups is one row of bytes:

    zero [N] | step [N] | smallest [N] | largest [N], all bf16 | bit planes | positions of the latter two [2 N] | 0...

A plane of p bits holds, in byte k of a group, the codes of the values k, k + s, k + 2 s, ... with s = group * p / 8,
from the low bits up.

A group that holds NaN or an infinity, or whose range leaves float32, comes back as NaN or infinity throughout.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_spd.collective import Quantisation

#: Values that are worked on at a time: all of their intermediate tensors stay in a core's cache.
_BLOCK = 1 << 16
#: The least step: its reciprocal is finite and neither is a subnormal number.
LEAST_STEP = 2.0**-126
_LOW_HALF = 0xFFFF


def quantise(values: Tensor, fmt: Quantisation) -> Tensor:
    """``values`` [r, n] of any float type, n a multiple of the group -> uint8 [r, fmt.wire_bytes(n)], row by row.

    Numbers are read as float32.
    """
    rows, n = values.shape
    groups = n // fmt.group
    wire = empty_messages(rows, n, fmt, values.device)
    grouped = values.unflatten(1, (groups, fmt.group))
    for row, part in _blocks(rows, groups, fmt.group):
        _encode(grouped[row, part].float(), _Message(wire[row], groups, fmt, part))
    return wire


def empty_messages(rows: int, n: int, fmt: Quantisation, device: torch.device) -> Tensor:
    """Messages uint8 [rows, fmt.wire_bytes(n)] of n values each, to be written: set is only what lies behind the last
    group, to 0."""
    wire = torch.empty(rows, fmt.wire_bytes(n), dtype=torch.uint8, device=device)
    wire[:, n // fmt.group * fmt.bytes_per_group :] = 0
    return wire


def dequantise(wire: Tensor, n: int, fmt: Quantisation) -> Tensor:
    """The values [r, n] in float32 of messages [r, fmt.wire_bytes(n)]; n is a multiple of the group."""
    values = torch.empty(len(wire), n, device=wire.device)
    grouped = values.unflatten(1, (-1, fmt.group))
    for row, part in _blocks(len(wire), n // fmt.group, fmt.group):
        _decode(_Message(wire[row], n // fmt.group, fmt, part), grouped[row, part])
    return values


def dequantise_sum(wire: Tensor, n: int, fmt: Quantisation) -> Tensor:
    """The sum [n] in float32, row after row, of the messages [r, fmt.wire_bytes(n)]."""
    total = torch.empty(n, device=wire.device)
    grouped = total.unflatten(0, (-1, fmt.group))
    for _, part in _blocks(1, n // fmt.group, fmt.group):
        into = _decode(_Message(wire[0], n // fmt.group, fmt, part), grouped[part])
        for row in wire[1:]:
            into += _decode(_Message(row, n // fmt.group, fmt, part), torch.empty_like(into))
    return total


def requantised_sum(wire: Tensor, n: int, scatter: Quantisation, gather: Quantisation) -> Tensor:
    """The message [1, gather.wire_bytes(n)] of the sum of the messages ``wire`` [r, scatter.wire_bytes(n)]."""
    return quantise(dequantise_sum(wire, n, scatter)[None], gather)


def _blocks(rows: int, groups: int, group: int) -> Iterator[tuple[int, slice]]:
    """Cache-sized runs of groups, row by row."""
    step = max(1, _BLOCK // group)
    for row in range(rows):
        for start in range(0, groups, step):
            yield row, slice(start, min(start + step, groups))


class _Message:
    """Views of what belongs to the groups ``part`` in one row of bytes that holds ``groups`` groups."""

    def __init__(self, row: Tensor, groups: int, fmt: Quantisation, part: slice) -> None:
        self.fmt = fmt
        # bf16 [4, k]: zero, step, the smallest and the largest value.
        self.heads = row[: 8 * groups].view(torch.bfloat16).view(4, groups)[:, part]
        # Width, number of lower bits in other planes, and bytes [k, group * width / 8] of every plane.
        self.planes: list[tuple[int, int, Tensor]] = []
        start, below = 8 * groups, 0
        for width in fmt.planes:
            size = fmt.group * width // 8
            plane = row[start : start + groups * size].view(groups, size)
            self.planes.append((width, below, plane[part]))
            start, below = start + groups * size, below + width
        self.positions = row[start : start + 2 * groups].view(2, groups)[:, part]


def _encode(x: Tensor, message: _Message) -> None:
    """Write the groups ``x`` [k, group], float32, into ``message``."""
    x, finite = _reserve_spikes(x, message)
    smallest, largest = x.amin(1), x.amax(1)
    # After the rounding, which would turn the bits of some NaN into those of a number.
    zero = _round_down(smallest) + finite
    step = _round_up((largest - zero).div_(message.fmt.levels)).clamp_min_(LEAST_STEP)
    message.heads[0].copy_(zero)
    message.heads[1].copy_(step)
    scaled = torch.sub(x, zero[:, None]).mul_(step.reciprocal_()[:, None]).add_(0.5)
    # By way of int32, for which PyTorch has vector instructions.
    _pack(scaled.to(torch.int32).to(torch.uint8), message)


def _reserve_spikes(x: Tensor, message: _Message) -> tuple[Tensor, Tensor]:
    """Write smallest and largest values of the groups ``x`` [k, group] and their positions into ``message``.

    Returns ``x`` with these values replaced by the smallest of the others, and [k] 0 for a group whose range is finite,
    NaN for another.
    """
    smallest, largest = x.min(1), x.max(1)
    finite = (largest.values - smallest.values).mul_(0.0)
    positions = torch.stack([smallest.indices, largest.indices])
    message.heads[2:].copy_(torch.stack([smallest.values, largest.values]).add_(finite))
    message.positions.copy_(positions)
    least = x.scatter(1, positions.T, torch.inf).amin(1, keepdim=True)
    return x.scatter(1, positions.T, least.expand(-1, 2)), finite


def _decode(message: _Message, out: Tensor) -> Tensor:
    """Read ``message`` into ``out`` [k, group], float32; returns it."""
    heads = message.heads.float()
    codes = _unpack(message)
    # The product is exact (8 bits times 8 bits), so fusing it into the sum changes nothing.
    out.copy_(codes).mul_(heads[1][:, None]).add_(heads[0][:, None])
    return out.scatter_(1, message.positions.T.long(), heads[2:].T)


def _pack(codes: Tensor, message: _Message) -> None:
    """Codes uint8 [k, group] into the message's planes."""
    for width, below, plane in message.planes:
        part = codes if below == 0 else codes >> below
        if below + width < message.fmt.bits:
            part = part & ((1 << width) - 1)
        pieces = part.split(plane.shape[1], 1)
        packed = pieces[0]
        for place, piece in enumerate(pieces[1:], 1):
            packed = packed | (piece << (width * place))
        plane.copy_(packed)


def _unpack(message: _Message) -> Tensor:
    """The codes uint8 [k, group] of the message's planes."""
    codes: Tensor | None = None
    for width, below, plane in message.planes:
        pieces = [plane >> place if place else plane for place in range(0, 8, width)]
        part = pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1).bitwise_and_((1 << width) - 1)
        codes = part if codes is None else codes.bitwise_or_(part << below)
    assert codes is not None
    return codes


def _round_down(x: Tensor) -> Tensor:
    """Float32 ``x`` rounded down to a number of bfloat16 (its upper half): a negative one away from zero."""
    bits = x.view(torch.int32)
    return (((bits >> 31) & _LOW_HALF) + bits).bitwise_and_(~_LOW_HALF).view(torch.float32)


def _round_up(x: Tensor) -> Tensor:
    """Float32 ``x`` >= 0 rounded up to a number of bfloat16."""
    return (x.view(torch.int32) + _LOW_HALF).bitwise_and_(~_LOW_HALF).view(torch.float32)
