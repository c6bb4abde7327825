"""The steps of the low-bit all-reduce as compiled loops over groups: the twins of ``quantize.py`` for a machine without
a GPU.

PyTorch needs some thirty passes over a message, one for each of its operations; here a group is read once, stays in
registers and the first cache, and is written once: about a tenth of the time. Formulas, bytes and their order are
those of ``quantize.py``; a test holds the two together.

Comparisons are made on integers that are ordered like the numbers, which the compiler can do several at a time; with
floats, NaN forbids it. One thread works: a rank of a machine without a GPU has a core or two.

Imported on first use: Numba is an extra, and compiling takes some seconds (kept on disk where that is possible).
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from megatron_spd.collective import Quantisation
from megatron_spd.comm.quantize import LEAST_STEP, empty_messages

_INFINITE = np.int32(0x7F800000)
_MAGNITUDE = np.int32(0x7FFFFFFF)
_MOST, _LEAST = np.int32(0x7FFFFFFF), np.int32(-0x80000000)
_NAN = np.uint16(0x7FC0)
_STEP, _HALF = np.float32(LEAST_STEP), np.float32(0.5)


def quantise(values: Tensor, fmt: Quantisation) -> Tensor:
    """As :func:`megatron_spd.comm.quantize.quantise`, for CPU tensors."""
    rows, n = values.shape
    wire = empty_messages(rows, n, fmt, values.device)
    _quantise_rows(values.float().contiguous().numpy(), *_views(wire), fmt.group, fmt.bits)
    return wire


def dequantise(wire: Tensor, n: int, fmt: Quantisation) -> Tensor:
    """As :func:`megatron_spd.comm.quantize.dequantise`, for CPU tensors."""
    values = torch.empty(len(wire), n)
    _dequantise_rows(*_views(wire), values.numpy(), fmt.group, fmt.bits)
    return values


def requantised_sum(wire: Tensor, n: int, scatter: Quantisation, gather: Quantisation) -> Tensor:
    """As :func:`megatron_spd.comm.quantize.requantised_sum`, for CPU tensors."""
    message = empty_messages(1, n, gather, wire.device)
    _requantise(*_views(wire), *_views(message), n, scatter.group, scatter.bits, gather.group, gather.bits)
    return message


def _views(wire: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The rows as bytes, as pairs of bytes, and eight bytes at a time (their length is a multiple of 16)."""
    rows = wire.contiguous().numpy()
    return rows, rows.view(np.uint16), rows.view(np.uint64)


def _compiled(function: Any) -> Any:
    settings: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    try:
        return numba.njit(cache=True, **settings)(function)
    except RuntimeError:  # neither the package's folder nor a home can be written to
        return numba.njit(**settings)(function)


# ---- numbers and their bits -----------------------------------------------------------------------------------------


def _bitcast(to: types.Type) -> Any:
    @intrinsic
    def cast(_context: Any, x: Any) -> Any:
        def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            return builder.bitcast(arguments[0], context.get_value_type(to))

        return to(x), generate

    return cast


_bits_of = _bitcast(types.int32)
_float_of = _bitcast(types.float32)


@_compiled
def _number(key: int) -> float:
    """The float32 that an ordered key stands for (+0 for both zeros)."""
    return _float_of(np.int32(np.int32(-key) | _LEAST)) if key < 0 else _float_of(np.int32(key))


@_compiled
def _from_bf16(half: int) -> float:
    return _float_of(np.int32(np.uint32(half) << np.uint32(16)))


@_compiled
def _upper(x: float) -> int:
    """The bfloat16 bits of a float32 that has no others."""
    return np.uint16(np.uint32(_bits_of(x)) >> np.uint32(16))


@_compiled
def _nearest(x: float) -> int:
    """The bits of the nearest bfloat16, ties to even."""
    word = np.uint32(_bits_of(x))
    odd = np.uint32((word >> np.uint32(16)) & np.uint32(1))
    return np.uint16(np.uint32(word + np.uint32(0x7FFF) + odd) >> np.uint32(16))


@_compiled
def _round_down(x: float) -> float:
    """Rounded down to a number of bfloat16: a negative one away from zero."""
    bits = np.int64(_bits_of(x))
    if bits < 0:
        bits += 0xFFFF
    return _float_of(np.int32(bits & ~np.int64(0xFFFF)))


@_compiled
def _round_up(x: float) -> float:
    """``x`` >= 0 rounded up to a number of bfloat16."""
    return _float_of(np.int32((np.int64(_bits_of(x)) + 0xFFFF) & ~np.int64(0xFFFF)))


# ---- whole messages -------------------------------------------------------------------------------------------------


@_compiled
def _quantise_rows(
    values: np.ndarray, wire: np.ndarray, pairs: np.ndarray, words: np.ndarray, group: int, bits: int
) -> None:
    codes, keys = np.empty(group // 8, np.uint64), np.empty(group, np.int32)
    single, groups = codes.view(np.uint8), values.shape[1] // group
    for row in range(values.shape[0]):
        x, raw = values[row], values[row].view(np.int32)
        row_bytes, row_pairs, row_words = wire[row], pairs[row], words[row]
        for g in range(groups):
            _encode(x, raw, g * group, keys, single, row_pairs, row_bytes, g, groups, bits)
            _pack(codes, single, row_bytes, row_words, g, groups, bits)


@_compiled
def _dequantise_rows(
    wire: np.ndarray, pairs: np.ndarray, words: np.ndarray, values: np.ndarray, group: int, bits: int
) -> None:
    codes = np.empty(group // 8, np.uint64)
    single, groups = codes.view(np.uint8), values.shape[1] // group
    for row in range(values.shape[0]):
        row_bytes, row_pairs, row_words, out = wire[row], pairs[row], words[row], values[row]
        for g in range(groups):
            _unpack(codes, single, row_bytes, row_words, g, groups, bits)
            _decode(single, row_pairs, row_bytes, g, groups, bits, out, g * group)


@_compiled
def _requantise(
    wire: np.ndarray,
    pairs: np.ndarray,
    words: np.ndarray,
    message: np.ndarray,
    message_pairs: np.ndarray,
    message_words: np.ndarray,
    n: int,
    group_in: int,
    bits_in: int,
    group_out: int,
    bits_out: int,
) -> None:
    """A run of values that is whole groups of both formats (their sizes are powers of two) at a time."""
    run = max(group_in, group_out)
    total, one = np.empty(run, np.float32), np.empty(group_in, np.float32)
    raw, keys = total.view(np.int32), np.empty(group_out, np.int32)
    codes_in, codes_out = np.empty(group_in // 8, np.uint64), np.empty(group_out // 8, np.uint64)
    single_in, single_out = codes_in.view(np.uint8), codes_out.view(np.uint8)
    own_bytes, own_pairs, own_words = message[0], message_pairs[0], message_words[0]
    groups_in, groups_out = n // group_in, n // group_out
    for start in range(0, n, run):
        for part in range(0, run, group_in):
            g = (start + part) // group_in
            for row in range(wire.shape[0]):
                _unpack(codes_in, single_in, wire[row], words[row], g, groups_in, bits_in)
                into, offset = (total, part) if row == 0 else (one, 0)
                _decode(single_in, pairs[row], wire[row], g, groups_in, bits_in, into, offset)
                if row > 0:
                    for k in range(group_in):
                        total[np.uintp(part + k)] += one[k]
        for part in range(0, run, group_out):
            g = (start + part) // group_out
            _encode(total, raw, part, keys, single_out, own_pairs, own_bytes, g, groups_out, bits_out)
            _pack(codes_out, single_out, own_bytes, own_words, g, groups_out, bits_out)


# ---- one group ------------------------------------------------------------------------------------------------------


@_compiled
def _encode(
    x: np.ndarray,
    raw: np.ndarray,
    start: int,
    keys: np.ndarray,
    codes: np.ndarray,
    pairs: np.ndarray,
    message: np.ndarray,
    g: int,
    groups: int,
    bits: int,
) -> None:
    """The codes of the values that start at ``x[start]`` (their bits: ``raw``), and what else group ``g`` of
    ``groups`` has in its ``message``."""
    size = len(keys)
    least, most, greatest = _MOST, _LEAST, np.int32(0)
    for k in range(size):
        # Both zeros are one number; a negative number's other bits grow as it falls.
        word = raw[np.uintp(start + k)]
        magnitude = np.int32(word & _MAGNITUDE)
        key = np.int32(-magnitude) if word < 0 else magnitude
        keys[k] = key
        greatest, least, most = max(greatest, magnitude), min(least, key), max(most, key)
    first, last = np.int32(size), np.int32(size)
    for k in range(size):
        first = min(first, np.int32(k) if keys[k] == least else _MOST)
        last = min(last, np.int32(k) if keys[k] == most else _MOST)
    smallest, largest = _number(least), _number(most)
    finite = greatest < _INFINITE and np.isfinite(np.float32(largest - smallest))
    # The range of the others; the two themselves get the code of the least.
    keys[first] = keys[last] = _MOST
    low = _MOST
    for k in range(size):
        low = min(low, keys[k])
    keys[first] = keys[last] = low
    high = _LEAST
    for k in range(size):
        high = max(high, keys[k])
    zero = _round_down(_number(low))
    step = max(_round_up(np.float32(_number(high) - zero) / np.float32((1 << bits) - 1)), _STEP)
    pairs[g] = _upper(zero) if finite else _NAN
    pairs[groups + g] = _upper(step) if finite else _NAN
    pairs[2 * groups + g] = _nearest(smallest) if finite else _NAN
    pairs[3 * groups + g] = _nearest(largest) if finite else _NAN
    positions = groups * (8 + size * bits // 8) + g
    message[positions], message[positions + groups] = first, last
    scale = np.float32(np.float32(1.0) / step)
    if finite:
        for k in range(size):
            codes[k] = np.uint8(
                np.int32(np.float32(np.float32(x[np.uintp(start + k)] - zero) * scale) + _HALF)
            )
        codes[first] = codes[last] = np.uint8(
            np.int32(np.float32(np.float32(_number(low) - zero) * scale) + _HALF)
        )
    else:
        codes[:] = 0


@_compiled
def _decode(
    codes: np.ndarray,
    pairs: np.ndarray,
    message: np.ndarray,
    g: int,
    groups: int,
    bits: int,
    out: np.ndarray,
    start: int,
) -> None:
    """The values of group ``g`` of ``groups``, whose ``codes`` are unpacked, into ``out[start:]``."""
    size = len(codes)
    zero, step = _from_bf16(pairs[g]), _from_bf16(pairs[groups + g])
    for k in range(size):
        out[np.uintp(start + k)] = np.float32(np.float32(codes[k]) * step) + zero
    positions = groups * (8 + size * bits // 8) + g
    out[start + message[positions]] = _from_bf16(pairs[2 * groups + g])
    out[start + message[positions + groups]] = _from_bf16(pairs[3 * groups + g])


@_compiled
def _pack(
    codes: np.ndarray,
    single: np.ndarray,
    message: np.ndarray,
    words: np.ndarray,
    g: int,
    groups: int,
    bits: int,
) -> None:
    """The planes of group ``g``, widest first (see ``quantize.py``), from its codes, eight to a word."""
    start, below = 8 * groups, np.uint64(0)
    for width in (8, 4, 2, 1):
        if not bits & width:
            continue
        count = len(codes) * width
        first = start + g * count
        # In every byte of a word; what a shift carries over from the next byte is masked.
        mask = np.uint64(((1 << width) - 1) * 0x0101010101010101)
        if count % 8 == 0:
            for k in range(count // 8):
                word = np.uint64(0)
                for place in range(8 // width):
                    part = np.uint64(codes[place * (count // 8) + k] >> below) & mask
                    word |= np.uint64(part << np.uint64(width * place))
                words[first // 8 + k] = word
        else:
            for k in range(count):
                word = np.uint64(0)
                for place in range(8 // width):
                    part = np.uint64(np.uint64(single[place * count + k]) >> below) & mask
                    word |= np.uint64(np.uint64(part & np.uint64(0xFF)) << np.uint64(width * place))
                message[first + k] = np.uint8(word)
        start, below = start + groups * count, below + np.uint64(width)


@_compiled
def _unpack(
    codes: np.ndarray,
    single: np.ndarray,
    message: np.ndarray,
    words: np.ndarray,
    g: int,
    groups: int,
    bits: int,
) -> None:
    """The inverse of :func:`_pack`."""
    start, below = 8 * groups, np.uint64(0)
    codes[:] = 0
    for width in (8, 4, 2, 1):
        if not bits & width:
            continue
        count = len(codes) * width
        first = start + g * count
        mask = np.uint64(((1 << width) - 1) * 0x0101010101010101)
        for place in range(8 // width):
            shift = np.uint64(width * place)
            if count % 8 == 0:
                for k in range(count // 8):
                    part = np.uint64(words[first // 8 + k] >> shift) & mask
                    codes[place * (count // 8) + k] |= np.uint64(part << below)
            else:
                for k in range(count):
                    part = np.uint64(np.uint64(message[first + k]) >> shift) & mask & np.uint64(0xFF)
                    single[place * count + k] |= np.uint8(np.uint64(part << below))
        start, below = start + groups * count, below + np.uint64(width)
