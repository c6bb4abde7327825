"""The cheapest choice among drop, low-bit and full at every sync point under an allowance of predicted damage.

Damage is log(perplexity / plain perplexity). That of a choice is predicted as the sum over its points of what drop or
format costs there alone, plus the prices of neighbouring dropped points (``neighbours.py``). With one option at every
point this is a multiple-choice knapsack; it is solved exactly, as a mixed-integer linear programme (SciPy's HiGHS).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from megatron_spd.collective import FULL, NONE
from megatron_spd.sensitivity.measured_sets import Collectives
from megatron_spd.sensitivity.neighbours import Prices, typical

Array = NDArray[np.float64]

#: The solver accepts an objective that is this far from the optimum, and constraints violated by as much; objectives
#: and constraints are scaled to make that negligible.
_SOLVER_SCALE = 1e3
#: Smaller allowances than this many typical damages are as good as none.
_LEAST_SCALE = 1e-3


class PlanOptimizer:
    """Chooses what runs at each of ``num_points`` sync points.

    ``drops``: damage of a point dropped alone, for every point that may be dropped. ``low_bit``: by format, damage of a
    point with that format alone. Points that neither has stay full. A negative damage counts as zero: a gain on one
    sample pays for no loss. ``costs``: what "none", "full" and each format cost at any point. ``prices``: of dropped
    neighbours, at least zero, in the unit of the damages.

    Raises ValueError for negative prices.
    """

    def __init__(
        self,
        num_points: int,
        drops: Mapping[int, float],
        low_bit: Mapping[str, Mapping[int, float]],
        costs: Mapping[str, float],
        prices: Prices,
    ) -> None:
        if min(prices.within, prices.across, prices.run) < 0:
            raise ValueError(f"{prices}; expected prices of at least 0")
        self.num_points, self._costs, self._prices = num_points, costs, prices
        self._drops = {p: max(0.0, d) for p, d in drops.items()}
        self._options = [self._options_of(p, low_bit) for p in range(num_points)]
        # One variable for each option of each point, then one for each priced pair and run.
        self._names = [(p, c) for p, options in enumerate(self._options) for c in options]
        self._places = {name: i for i, name in enumerate(self._names)}
        self._priced = list(self._priced_runs())
        self._cost = np.array([costs[c] for _, c in self._names] + [0.0] * len(self._priced))
        alone = [self._options[p][c] for p, c in self._names]
        self._damage = np.array(alone + [price for _, price in self._priced])
        self._rules = self._structure()

    def _options_of(self, point: int, low_bit: Mapping[str, Mapping[int, float]]) -> dict[str, float]:
        """Damage by what may run at ``point``, without formats that another format, or full, beats at both cost and
        damage."""
        options = {FULL: 0.0}
        formats = {name: max(0.0, held[point]) for name, held in low_bit.items() if point in held}
        for name in sorted(formats, key=lambda n: (self._costs[n], formats[n])):
            better = (o for o, damage in options.items() if damage <= formats[name])
            if all(self._costs[o] > self._costs[name] for o in better):
                options[name] = formats[name]
        if point in self._drops:
            options[NONE] = self._drops[point]
        return options

    def _priced_runs(self) -> Iterator[tuple[tuple[int, ...], float]]:
        """Neighbouring points (two, or three of a run) and what dropping them together costs beyond the points."""
        for pair in pairwise(range(self.num_points)):
            price = self._prices.within if pair[0] % 2 == 0 else self._prices.across
            if price and all(p in self._drops for p in pair):
                yield pair, price
        for first in range(self.num_points - 2):
            run = (first, first + 1, first + 2)
            if self._prices.run and all(p in self._drops for p in run):
                yield run, self._prices.run

    def _structure(self) -> list[LinearConstraint]:
        """One option at every point; the variable of a priced run is 1 where all its points are dropped."""
        entries = [(p, self._places[p, c], 1.0) for p, c in self._names]
        chosen = LinearConstraint(self._matrix(entries, self.num_points), 1, 1)
        if not self._priced:
            return [chosen]
        entries = []
        for row, (points, _) in enumerate(self._priced):
            entries += [(row, self._places[p, NONE], 1.0) for p in points]
            entries.append((row, len(self._names) + row, -1.0))
        most = np.array([len(points) - 1.0 for points, _ in self._priced])
        return [chosen, LinearConstraint(self._matrix(entries, len(self._priced)), -np.inf, most)]

    def _matrix(self, entries: list[tuple[int, int, float]], rows: int) -> Any:
        i, j, values = zip(*entries, strict=True)
        return coo_array((values, (i, j)), shape=(rows, len(self._cost))).tocsr()

    def cheapest(self, allowance: float) -> Collectives:
        """The choice of least cost whose predicted damage is at most ``allowance`` (>= 0); of several the one of least
        damage."""
        scale = max(allowance, _LEAST_SCALE * typical(self._damage.tolist()))
        # What is too much alone is ruled out here: beside its size the solver's tolerances would not be small.
        possible = Bounds(0, (self._damage <= allowance).astype(np.float64))
        damage = np.where(possible.ub, self._damage, 0.0) / scale
        within = LinearConstraint(damage[None], -np.inf, allowance / scale)
        unit = max(self._costs.values()) or 1.0
        cost = self._cost / unit
        cheapest = self._solve(cost, within, possible)
        no_dearer = LinearConstraint(cost[None], -np.inf, float(cost @ cheapest) + 1e-9)
        best = self._solve(damage, no_dearer, possible)
        return tuple(c for (_, c), x in zip(self._names, best.tolist(), strict=False) if x)

    def _solve(self, objective: Array, limit: LinearConstraint, possible: Bounds) -> Array:
        """The variables [n] that minimise ``objective`` under ``limit``, each 0 or 1."""
        found = milp(
            objective * _SOLVER_SCALE,
            integrality=np.ones_like(objective),
            bounds=possible,
            constraints=[*self._rules, limit],
            options={"mip_rel_gap": 0.0},
        )
        if found.x is None:
            raise RuntimeError(f"the solver found no choice of collectives: {found.message}")
        return np.round(found.x)

    def cost(self, collectives: Collectives) -> float:
        """What ``collectives`` cost together."""
        return sum(self._costs[c] for c in collectives)

    def damage(self, collectives: Collectives) -> float:
        """The damage that is predicted for ``collectives``."""
        alone = sum(self._options[p][c] for p, c in enumerate(collectives))
        return alone + sum(price for run, price in self._priced if all(collectives[p] == NONE for p in run))

    @property
    def greatest_damage(self) -> float:
        """At least the damage of any choice."""
        return sum(max(options.values()) for options in self._options) + sum(p for _, p in self._priced)
