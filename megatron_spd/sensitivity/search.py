"""Which sync points to drop, searched by measuring whole sets (method section 9).

Scores of single points add up only roughly, so sets are measured: first a few least-damage sets by the scores and
different prices for neighbours; then, set after set, the candidate that is expected to improve most on the best.
What is expected comes from :class:`~megatron_spd.sensitivity.damage_model.DamageModel`, refitted to every measurement
(the expected improvement of Bayesian optimisation). Candidates are one exchange away from the best sets (one dropped
point kept, one kept point dropped), or the model's own optimum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_spd.errors import UserError
from megatron_spd.sensitivity.damage_model import Array, DamageModel
from megatron_spd.sensitivity.measured_sets import MeasuredSets
from megatron_spd.sensitivity.neighbours import Prices

#: Dropped points, ascending.
Points = tuple[int, ...]

#: Prices of the starting sets, in median damages of a point; beside them the model's optimum before it has learnt.
_START_PRICES = (Prices(0.5, 3.0), Prices(0.0, 2.0, 1.0), Prices(4.0, 4.0), Prices(0.0, 0.0))
#: An expected improvement of log-perplexity below this is not worth a measurement (0.005 % of perplexity).
_LEAST_GAIN = 5e-5
#: A damage that every set should stay below: where even the best set is infinitely bad, candidates still differ.
_RUIN = 50.0
#: Of how many of the best sets the neighbours are candidates.
_BASES = 3
#: Sets measured at a count that does not fit before a smaller one is tried.
_TRIES = 3


@dataclass(frozen=True)
class MeasuredSet:
    """One set that a search looked at. ``origin``: start, exchange, optimum, or extension (from a set of another size).
    ``predicted``: the perplexity that the model expected."""

    points: Points
    perplexity: float
    predicted: float
    origin: str


@dataclass(frozen=True)
class SearchResult:
    """The set found and its measured perplexity; ``history``: all ``measured`` sets of the search, in order."""

    points: Points
    perplexity: float
    history: tuple[MeasuredSet, ...]

    @property
    def measured(self) -> int:
        """How many sets the search looked at."""
        return len(self.history)


@dataclass(frozen=True)
class _Candidate:
    points: Points
    origin: str


class Search:
    """Finds sets of sync points by measurement. Deterministic, and resumable from ``state``.

    ``scores``: point -> rise in perplexity when only it is dropped, for every point that may be dropped.
    ``measure(points)``: perplexity with exactly ``points`` (ascending) dropped; ``plain_perplexity``: with none, on the
    same text. ``budget``: the most sets that one call looks at; sets in the state file count too, so that a killed
    search goes on as if it had not been killed. ``state``: file of measured sets; ``identity`` names what they were
    measured on. ``progress`` hears of every set looked at. What was measured in one call is known to the next.

    Not collective: one process searches. ``measure`` may run on others too.

    Raises:
        UserError: a score or the plain perplexity is not usable, the budget is below 1, or the state file is of another
            search.
    """

    def __init__(
        self,
        scores: Mapping[int, float],
        measure: Callable[[Points], float],
        plain_perplexity: float,
        budget: int,
        state: Path | None = None,
        identity: str = "",
        progress: Callable[[MeasuredSet], object] = lambda measured: None,
    ) -> None:
        if budget < 1:
            raise UserError(f"a budget of {budget} measurements; expected at least 1")
        self.plain_perplexity, self.budget = plain_perplexity, budget
        self._points = tuple(sorted(scores))
        self._model = DamageModel(log_increases(scores, plain_perplexity))
        self._measure, self._progress = measure, progress
        self._store = MeasuredSets(state, identity)
        self._known: dict[Points, float] = {(): plain_perplexity}
        self._history: list[MeasuredSet] = []
        # What was last found to be the best of its size: `measure` is likely to hold its hidden states.
        self._base: Points = ()

    def best_of_size(self, count: int) -> SearchResult:
        """The set of ``count`` points with the lowest perplexity among all that were measured.

        Ends when the budget is spent or no candidate is expected to be better. Raises UserError for a count that is not
        in 0..number of scores.
        """
        if not 0 <= count <= len(self._points):
            raise UserError(
                f"{count} sync points to drop; expected 0 to {len(self._points)}, the points with scores"
            )
        self._history = []
        starts = [self._model.best_set(count), *(self._model.best_set(count, p) for p in _START_PRICES)]
        for points in starts:
            if self._left():
                self._look_at(_Candidate(points, "start"))
        while self._left():
            candidate = self._next(count, self._damage(self._ranked(count)[0]))
            if candidate is None:
                break
            self._look_at(candidate)
        return self._result(self._ranked(count)[0])

    def largest_within(self, max_increase_percent: float) -> SearchResult:
        """The largest measured set whose perplexity is at most ``max_increase_percent`` above the plain one; of several
        the best. The empty set fits always.

        The model brackets the size, galloping away from sizes that fit and do not fit; what is left of the budget is
        spent on the smallest size that has not fitted yet. Raises UserError for a negative or not finite percentage.
        """
        if not (math.isfinite(max_increase_percent) and max_increase_percent >= 0):
            raise UserError(f"a perplexity increase of {max_increase_percent} %; expected a number >= 0")
        self._history = []
        limit = self.plain_perplexity * (1 + max_increase_percent / 100)
        self._bracket(limit)
        while self._left():
            count = len(self._largest(limit)) + 1
            if count > len(self._points):
                break
            candidate = self._next(count, self._log(limit))
            if candidate is None:
                break
            self._look_at(candidate)
        return self._result(self._largest(limit))

    def _bracket(self, limit: float) -> None:
        """Measure sets until a size fits ``limit`` and the next one did not in a few tries."""
        too_large = len(self._points) + 1
        step = 1
        rose: bool | None = None
        while self._left():
            fits = len(self._largest(limit))
            too_large = max(too_large, fits + 1)
            if too_large == fits + 1:
                return
            # The further the prediction has been off in one direction, the longer the step.
            expected = self._expected_size(limit, fits + 1, too_large - 1)
            count = max(expected, fits + step) if rose else min(expected, too_large - step)
            count = min(max(count, fits + 1), too_large - 1)
            fitted = self._try(count, limit)
            if not fitted:
                too_large = count
            step = 2 * step if fitted == rose else 1
            rose = fitted

    def _try(self, count: int, limit: float) -> bool:
        """Whether one of a few sets of ``count`` points is measured to fit."""
        if not self._ranked(count):
            self._look_at(_Candidate(self._model.best_set(count), "optimum"))
        for _ in range(_TRIES - 1):
            if self._fits(count, limit) or not self._left():
                break
            candidate = self._next(count, self._log(limit))
            if candidate is None:
                break
            self._look_at(candidate)
        return self._fits(count, limit)

    def _expected_size(self, limit: float, low: int, high: int) -> int:
        """The largest size in ``low``..``high`` that is expected to fit ``limit``, else ``low``."""
        while low < high:
            middle = (low + high + 1) // 2
            members = self._model.members([self._model.best_set(middle)])
            if self._model.predict(members)[0][0] <= self._log(limit):
                low = middle
            else:
                high = middle - 1
        return low

    # ---- candidates ---------------------------------------------------------------------------------------

    def _next(self, count: int, goal: float) -> _Candidate | None:
        """The candidate of ``count`` points that is expected to get furthest below the damage ``goal``, None if none is
        promising. Of equal ones that which changes the last best set latest: less of the model is behind the change."""
        bases = [*self._ranked(count - 1)[:1], *self._ranked(count)[:_BASES], *self._ranked(count + 1)[:1]]
        proposed = [_Candidate(self._model.best_set(count), "optimum")]
        for base in bases:
            proposed += _neighbours(base, self._points, count)
        candidates = list({c.points: c for c in proposed if c.points not in self._known}.values())
        if not candidates:
            return None
        mean, sd = self._model.predict(self._model.members([c.points for c in candidates]))
        # Rounded, so that equal gains are equal.
        gains = np.round(_expected_gain(mean, sd, min(goal, _RUIN)), 9)
        if gains.max() < _LEAST_GAIN:
            return None
        equal = [candidates[i] for i in np.flatnonzero(gains == gains.max())]
        return max(equal, key=lambda c: min(set(c.points) ^ set(self._base)))

    # ---- measurements --------------------------------------------------------------------------------------

    def _look_at(self, candidate: _Candidate) -> None:
        """Measure a set that is not known yet, or take it from the state file."""
        points = candidate.points
        if points in self._known:
            return
        predicted = float(self._model.predict(self._model.members([points]))[0][0])
        perplexity = self._store.get(points)
        if perplexity is None:
            measured = float(self._measure(points))
            perplexity = math.inf if math.isnan(measured) else measured
            self._store.add(points, perplexity)
        self._known[points] = perplexity
        self._model.fit(list(self._known), [self._damage(p) for p in self._known])
        # exp of more than 700 overflows.
        expected = self.plain_perplexity * math.exp(min(predicted, 700.0))
        record = MeasuredSet(points, perplexity, expected, candidate.origin)
        self._history.append(record)
        self._progress(record)
        if self._ranked(len(points))[0] == points:
            self._base = points

    def _left(self) -> bool:
        return len(self._history) < self.budget

    def _ranked(self, count: int) -> list[Points]:
        """The known sets of ``count`` points, best first; equal ones in the order in which they were measured."""
        return sorted((points for points in self._known if len(points) == count), key=self._known.__getitem__)

    def _fits(self, count: int, limit: float) -> bool:
        return any(self._known[points] <= limit for points in self._ranked(count))

    def _largest(self, limit: float) -> Points:
        """The largest known set that fits ``limit``; of several the best. The empty set fits always."""
        fitting = [points for points, perplexity in self._known.items() if perplexity <= limit]
        return min(fitting, key=lambda points: (-len(points), self._known[points]), default=())

    def _log(self, perplexity: float) -> float:
        return math.log(perplexity / self.plain_perplexity)

    def _damage(self, points: Points) -> float:
        return self._log(self._known[points])

    def _result(self, points: Points) -> SearchResult:
        return SearchResult(points, self._known[points], tuple(self._history))


def log_increases(scores: Mapping[int, float], plain_perplexity: float) -> dict[int, float]:
    """Point -> log(perplexity / plain perplexity) when only it is dropped."""
    if not (math.isfinite(plain_perplexity) and plain_perplexity > 0):
        raise UserError(f"a plain perplexity of {plain_perplexity}; expected a number > 0")
    for point, score in scores.items():
        if not (math.isfinite(score) and plain_perplexity + score > 0):
            raise UserError(
                f"the sensitivity of sync point {point} is {score} beside a plain perplexity of {plain_perplexity:g}; "
                "expected a finite rise of it; measure again with `megatron-spd sensitivity`"
            )
    return {point: math.log1p(score / plain_perplexity) for point, score in scores.items()}


def _neighbours(base: Points, droppable: Points, count: int) -> list[_Candidate]:
    """The sets of ``count`` points one step away from ``base``: an exchange, or one point more or less."""
    inside = set(base)
    outside = [p for p in droppable if p not in inside]
    if count > len(base):
        return [_Candidate(tuple(sorted((*base, new))), "extension") for new in outside]
    without = [tuple(p for p in base if p != old) for old in base]
    if count < len(base):
        return [_Candidate(rest, "extension") for rest in without]
    return [_Candidate(tuple(sorted((*rest, new))), "exchange") for rest in without for new in outside]


def _expected_gain(mean: Array, sd: Array, goal: float) -> Array:
    """The expected improvement [n]: how far below ``goal`` damages of normal ``mean`` and ``sd`` [n] fall on average,
    counting nothing where they stay above."""
    sd = np.maximum(sd, 1e-12)
    z = (goal - mean) / sd
    below = np.array([0.5 * (1 + math.erf(v / math.sqrt(2))) for v in z.tolist()])
    return (goal - mean) * below + sd * np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
