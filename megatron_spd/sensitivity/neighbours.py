"""The least-damage choice of sync points when neighbours cost extra: an exact dynamic programme.

Damage of a choice = the sum of its points' scores, plus a price for every two neighbouring points, plus a price
for every point that makes a run of dropped points longer than two. Neighbours inside a block (attention, then its
MLP) and across blocks (MLP, then the next attention) have prices of their own: dropped together, the former mostly
cost what they cost alone, the latter clearly more (measured, SmolLM2-135M). Pure Python.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

#: (damage, points ascending)
Choice = tuple[float, tuple[int, ...]]


@dataclass(frozen=True)
class Prices:
    """What dropped neighbours cost beyond their own scores, in the unit of the scores."""

    #: Points 2i and 2i + 1.
    within: float
    #: Points 2i + 1 and 2i + 2.
    across: float
    #: Every point of a run of dropped points behind its second.
    run: float = 0.0

    def times(self, unit: float) -> Prices:
        """The same prices in another unit."""
        return Prices(self.within * unit, self.across * unit, self.run * unit)


def least_damage(
    scores: Mapping[int, float], prices: Prices, pairs: Mapping[int, float] | None = None
) -> list[Choice]:
    """The choice of every size 0..len(scores) with the least damage, first in order where several are equal.

    ``pairs``: first point of a pair of neighbours -> what this pair costs beyond its price.
    """
    # By how long the run of chosen points is that ends here (0, 1, or 2 and more) and by size: what comes next
    # depends on nothing else.
    ends: list[dict[int, Choice]] = [{0: (0.0, ())}, {}, {}]
    previous: int | None = None
    for point in sorted(scores):
        if previous is None or point != previous + 1:
            ends = [_least(ends), {}, {}]
            pair = 0.0
        else:
            pair = prices.across if point % 2 == 0 else prices.within
            pair += pairs.get(previous, 0.0) if pairs else 0.0
        alone, second, longer = (
            _taken(choices, point, scores[point] + extra)
            for choices, extra in zip(ends, (0.0, pair, pair + prices.run), strict=True)
        )
        ends = [_least(ends), alone, _least([second, longer])]
        previous = point
    best = _least(ends)
    return [best[size] for size in range(len(scores) + 1)]


def typical(scores: Iterable[float]) -> float:
    """The median size of the scores that are not zero; 1 if all are."""
    sizes = sorted(abs(s) for s in scores if s)
    return sizes[len(sizes) // 2] if sizes else 1.0


def _taken(choices: Mapping[int, Choice], point: int, cost: float) -> dict[int, Choice]:
    return {size + 1: (damage + cost, (*chosen, point)) for size, (damage, chosen) in choices.items()}


def _least(parts: list[dict[int, Choice]]) -> dict[int, Choice]:
    sizes = set().union(*parts)
    return {size: min(part[size] for part in parts if size in part) for size in sizes}
