"""Where the time of a forward pass goes: compute, communication, and waiting for other ranks, block by block.

The ranks' clocks are not compared. A collective ends on all ranks at about the same time, so the rank that entered it
last spends the least time in it: that is what the collective itself takes (communication), and what the others spend
beyond it they have waited. (Where groups of ranks have a collective each, this holds in every group.) Compute is a
block's time outside its collectives. All figures are means over the ranks.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from megatron_spd.latency.clock import Clock
from megatron_spd.latency.collectives import Recording


class TimedCall(NamedTuple):
    """A collective (see ``collectives.Call``) and its seconds."""

    name: str
    block: int | None
    num_bytes: int
    ranks: int
    seconds: float


@dataclass(frozen=True)
class RankTimes:
    """One rank's recording in seconds. ``calls``: in order; ``blocks``: of each block; ``total``: of the whole pass."""

    calls: list[TimedCall]
    blocks: list[float]
    total: float


@dataclass(frozen=True)
class Parts:
    """Seconds."""

    compute: float
    communication: float
    wait: float

    @property
    def total(self) -> float:
        return self.compute + self.communication + self.wait


@dataclass(frozen=True)
class Breakdown:
    """Of one forward pass: ``blocks`` [L], and ``outside`` of them (embedding, final norm, output layer)."""

    blocks: list[Parts]
    outside: Parts

    @property
    def total(self) -> Parts:
        every = [*self.blocks, self.outside]
        return Parts(*(sum(getattr(p, name) for p in every) for name in ("compute", "communication", "wait")))


def rank_times(recording: Recording, clock: Clock) -> RankTimes:
    """The recording's marks as seconds, after ``clock.finish()``."""
    calls = [
        TimedCall(c.name, c.block, c.num_bytes, c.ranks, clock.seconds(c.start, c.end))
        for c in recording.calls
    ]
    blocks = [clock.seconds(start, end) for _, start, end in sorted(recording.blocks, key=lambda b: b[0])]
    return RankTimes(calls, blocks, clock.seconds(recording.start, recording.end))


def break_down(ranks: Sequence[RankTimes]) -> Breakdown:
    """The parts of one pass from the times of all its ranks in their order (ranks of a group follow each other).

    Raises RuntimeError if the ranks did not make the same calls.
    """
    if len({tuple((call.name, call.block, call.ranks) for call in times.calls) for times in ranks}) != 1:
        raise RuntimeError("the ranks made different collectives; their times cannot be compared")
    num_blocks = len(ranks[0].blocks)
    places: list[int | None] = [*range(num_blocks), None]
    inside = dict.fromkeys(places, 0.0)
    least = dict.fromkeys(places, 0.0)
    for calls in zip(*(times.calls for times in ranks), strict=True):
        place, size, seconds = calls[0].block, calls[0].ranks, [call.seconds for call in calls]
        inside[place] += statistics.fmean(seconds)
        groups = (seconds[first : first + size] for first in range(0, len(seconds), size))
        least[place] += statistics.fmean(map(min, groups))
    whole: dict[int | None, float] = {
        i: statistics.fmean(times.blocks[i] for times in ranks) for i in range(num_blocks)
    }
    whole[None] = statistics.fmean(times.total for times in ranks) - sum(whole.values())
    parts = {p: Parts(whole[p] - inside[p], least[p], inside[p] - least[p]) for p in places}
    return Breakdown([parts[i] for i in range(num_blocks)], parts[None])


def median_breakdown(passes: Sequence[Breakdown]) -> Breakdown:
    """Each figure's median over several passes of the same model."""

    def middle(parts: Sequence[Parts]) -> Parts:
        names = ("compute", "communication", "wait")
        return Parts(*(statistics.median(getattr(p, name) for p in parts) for name in names))

    blocks = [middle(same) for same in zip(*(one.blocks for one in passes), strict=True)]
    return Breakdown(blocks, middle([one.outside for one in passes]))


def as_json(breakdown: Breakdown) -> dict[str, Any]:
    """Seconds under ``total``, ``outside`` (by part) and ``blocks`` (a list by part)."""
    names = ("compute", "communication", "wait")
    return {
        "total": {name: getattr(breakdown.total, name) for name in names},
        "outside": {name: getattr(breakdown.outside, name) for name in names},
        "blocks": {name: [getattr(p, name) for p in breakdown.blocks] for name in names},
    }
