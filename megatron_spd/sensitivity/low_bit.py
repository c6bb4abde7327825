"""Low-bit points among the candidates that are measured: their schedules, and where measuring them makes sense."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from megatron_spd.calibration.stream import BlockStreamer
from megatron_spd.comm.lowbit import PLAIN_BELOW
from megatron_spd.errors import UserError
from megatron_spd.plan import BlockSchedule


def with_low_bit(schedule: BlockSchedule, block: int, low_bit: Mapping[int, str]) -> BlockSchedule:
    """``schedule`` of block ``block`` with the formats that ``low_bit`` (by sync point) has for its two points."""
    found: dict[str, Any] = {}
    for name, point in (("attention_collective", 2 * block), ("mlp_collective", 2 * block + 1)):
        if point in low_bit:
            found[name] = low_bit[point]
    return dataclasses.replace(schedule, **found)


def check_low_bit_measurable(streamer: BlockStreamer, branches: int, tokens: Tensor) -> None:
    """Raise UserError unless low-bit all-reduces of ``tokens`` [n, s] come out here as on G = ``branches`` ranks.

    One process computes what G ranks would get, and G ranks get it. In between, ranks round sums of several branches;
    and on several ranks a message below :data:`~megatron_spd.comm.lowbit.PLAIN_BELOW` would be measured without any
    rounding.
    """
    ranks = streamer.runtime.tp_size
    if ranks not in (1, branches):
        raise UserError(
            f"low-bit all-reduces are measured on one rank or on all G = {branches}, not on {ranks}: what is rounded "
            f"depends on it; give --ranks 1 or --ranks {branches}"
        )
    message = tokens.shape[1] * streamer.reader.hidden_size * streamer.dtype.itemsize
    if ranks > 1 and message < PLAIN_BELOW:
        raise UserError(
            f"a piece of {tokens.shape[1]} tokens makes messages of {message} bytes, which several ranks exchange in "
            f"full below {PLAIN_BELOW}; give longer pieces with --seq-length, or --ranks 1"
        )
