"""The cheapest choice among drop, low-bit and full that measurement confirms to keep a limit of perplexity.

Predictions add up single points and are off, so the allowance of predicted damage is what is searched: it is bisected
until the choice that it stands for (``optimize.py``) fits the limit and the next one that differs does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from megatron_spd.collective import FULL
from megatron_spd.errors import UserError
from megatron_spd.sensitivity.measured_sets import Collectives, MeasuredCollectives
from megatron_spd.sensitivity.optimize import PlanOptimizer

#: Allowances closer than this to each other, relative to the greater, are not told apart.
_RESOLUTION = 1e-3
#: Nor are those closer than this (0.01 % of perplexity), the least one that is tried beside a limit of 0 %.
_LEAST_STEP = 1e-4


@dataclass(frozen=True)
class MeasuredChoice:
    """One choice that a search looked at: its cost, the perplexity that was predicted, the one that the measured
    divergence from the plain model stands for (``equivalent``), and the measured one."""

    collectives: Collectives
    cost: float
    predicted: float
    equivalent: float
    perplexity: float

    @property
    def confirmed(self) -> float:
        """The greater of both measured figures: a limit holds for both."""
        return max(self.equivalent, self.perplexity)


@dataclass(frozen=True)
class CheapestResult:
    """The choice found, and all that the search looked at, in order. The choice is one of them, or all points full."""

    best: MeasuredChoice
    history: tuple[MeasuredChoice, ...]
    plain_perplexity: float


class CheapestSearch:
    """Finds the cheapest choice within a limit. Deterministic, and resumable from ``store``.

    ``measure(collectives)``: the two figures of ``measure.py``; ``plain_perplexity``: with all points full. ``budget``:
    the most choices that the search looks at; those in the store count too, so that a killed search goes on as if it
    had not been killed. ``progress`` hears of every choice looked at.

    Not collective: one process searches. ``measure`` may run on others too.

    Raises UserError for a budget below 1.
    """

    def __init__(
        self,
        optimizer: PlanOptimizer,
        measure: Callable[[Collectives], tuple[float, float]],
        plain_perplexity: float,
        budget: int,
        store: MeasuredCollectives,
        progress: Callable[[MeasuredChoice], object] = lambda measured: None,
    ) -> None:
        if budget < 1:
            raise UserError(f"a budget of {budget} measurements; expected at least 1")
        self.plain_perplexity, self.budget = plain_perplexity, budget
        self._optimizer, self._measure, self._store, self._progress = optimizer, measure, store, progress
        full = (FULL,) * optimizer.num_points
        plain = MeasuredChoice(full, optimizer.cost(full), *[plain_perplexity] * 3)
        self._known: dict[Collectives, MeasuredChoice] = {full: plain}
        self._history: list[MeasuredChoice] = []

    def within(self, max_increase_percent: float) -> CheapestResult:
        """The cheapest measured choice of which both figures are at most ``max_increase_percent`` above plain; of
        several the one of least damage. All points full fits always.

        Raises UserError for a negative or not finite percentage.
        """
        allowance = damage_limit(max_increase_percent)
        limit = self.plain_perplexity * (1 + max_increase_percent / 100)
        greatest = max(self._optimizer.greatest_damage, allowance, _LEAST_STEP)
        low, high = 0.0, math.inf
        while math.isinf(high) or high - low > max(_RESOLUTION * high, _LEAST_STEP):
            choice = self._optimizer.cheapest(allowance)
            if choice not in self._known and len(self._history) == self.budget:
                break
            if self._looked_at(choice).confirmed <= limit:
                if allowance >= greatest:
                    break
                low = allowance
            else:
                high = allowance
            doubled = min(max(2 * low, _LEAST_STEP), greatest)
            allowance = doubled if math.isinf(high) else (low + high) / 2
        fitting = [c for c in self._known.values() if c.confirmed <= limit]
        best = min(fitting, key=lambda c: (c.cost, c.confirmed))
        return CheapestResult(best, tuple(self._history), self.plain_perplexity)

    def _looked_at(self, collectives: Collectives) -> MeasuredChoice:
        """A choice as measured now, before, or in the store."""
        if collectives in self._known:
            return self._known[collectives]
        figures = self._store.get(collectives)
        if figures is None:
            equivalent, perplexity = self._measure(collectives)
            figures = _number(equivalent), _number(perplexity)
            self._store.add(collectives, figures)
        # exp of more than 700 overflows.
        predicted = self.plain_perplexity * math.exp(min(self._optimizer.damage(collectives), 700.0))
        choice = MeasuredChoice(collectives, self._optimizer.cost(collectives), predicted, *figures)
        self._known[collectives] = choice
        self._history.append(choice)
        self._progress(choice)
        return choice


def damage_limit(max_increase_percent: float) -> float:
    """The damage, log(perplexity / plain perplexity), of an increase in per cent.

    Raises UserError for a negative or not finite percentage.
    """
    if not (math.isfinite(max_increase_percent) and max_increase_percent >= 0):
        raise UserError(f"a perplexity increase of {max_increase_percent} %; expected a number >= 0")
    return math.log1p(max_increase_percent / 100)


def _number(perplexity: float) -> float:
    return math.inf if math.isnan(perplexity) else perplexity
