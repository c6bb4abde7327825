"""What less communication can save: bytes over the link's rate, calls times what a call costs."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Of at least one value. Raises ValueError for none."""
        numbers = list(values)
        if not numbers:
            raise ValueError("no values")
        if len(numbers) == 1:
            return cls(numbers[0], numbers[0], numbers[0])
        low, median, high = statistics.quantiles(numbers, n=4, method="inclusive")
        return cls(median, low, high)


@dataclass(frozen=True)
class LinkSpeed:
    """What the ranks' own all-reduces show of their link.

    ``seconds_per_call``: of an all-reduce of one number; ``bytes_per_second``: that a rank sends in a large one, None
    where nothing has to cross; ``nominal``: bytes per second that the link is set to, where it is known.
    """

    seconds_per_call: float
    bytes_per_second: float | None
    nominal: float | None = None

    def seconds(self, calls: float, sent: float) -> float:
        """Time of ``calls`` collectives in which a rank sends ``sent`` bytes altogether."""
        return calls * self.seconds_per_call + (
            sent / self.bytes_per_second if self.bytes_per_second else 0.0
        )

    def least_seconds(self, sent: float) -> float:
        """The bound: time that ``sent`` bytes need at the link's rate (as set, or else as measured), calls for free."""
        rate = self.nominal or self.bytes_per_second
        return sent / rate if rate else 0.0


def bytes_sent(collective: str, num_bytes: float, ranks: int) -> float:
    """Bytes that each of ``ranks`` must send in a collective to which it gives ``num_bytes``, by the best algorithm for
    large messages: an all-reduce is a reduce-scatter and an all-gather, each (M - 1) / M of the tensor.

    Raises KeyError for a collective that is none of those observed.
    """
    share = (ranks - 1) / ranks
    factors = {
        "all_reduce": 2 * share,
        "broadcast": share,
        "all_gather": ranks - 1,
        "all_gather_into_tensor": ranks - 1,
        "all_gather_single": ranks - 1,
        "all_to_all": share,
        "all_to_all_single": share,
        "reduce_scatter": share,
        "reduce_scatter_tensor": share,
        "reduce_scatter_single": share,
    }
    return factors[collective] * num_bytes


@dataclass(frozen=True)
class Saving:
    """What a variant saves of the plain model's time, in seconds, beside what it could.

    ``measured``: round by round against the plain run of the same round. ``predicted``: from calls and bytes at the
    speed that the link showed. ``bound``: the bytes alone at the link's rate. ``change``: as a share of the plain
    time, negative where time is saved.
    """

    measured: Spread
    predicted: float
    bound: float
    change: Spread

    @property
    def of_predicted(self) -> float | None:
        """The share of the predicted saving that was measured; None where nothing is saved."""
        return self.measured.median / self.predicted if self.predicted > 0 else None


def saving(
    plain: Sequence[float],
    other: Sequence[float],
    calls_saved: float,
    sent_saved: float,
    link: LinkSpeed,
    seconds_inside: float = 0.0,
) -> Saving:
    """The saving of ``other`` over ``plain``: seconds of each in the same rounds; ``calls_saved`` collectives over
    ``link`` and ``sent_saved`` bytes that a rank sends in them, for which ``other`` is predicted to spend
    ``seconds_inside`` branch groups."""
    pairs = list(zip(plain, other, strict=True))
    return Saving(
        measured=Spread.of(p - o for p, o in pairs),
        predicted=link.seconds(calls_saved, sent_saved) - seconds_inside,
        bound=link.least_seconds(sent_saved),
        change=Spread.of((o - p) / p for p, o in pairs),
    )
