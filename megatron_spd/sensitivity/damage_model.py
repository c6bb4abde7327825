"""What a set of dropped sync points is expected to cost, learnt from the sets measured so far.

Damage is log(perplexity / plain perplexity): increases compose there. A set S of n points is modelled as

    y(S) = (a + b n / N) sum_p s_p + sum_p d_p                        every point, more so the more are dropped
         + u (w W + c C + t T) + sum over neighbouring pairs e_pp'    neighbours
         + error

with s_p the damage of point p alone, N the model's points, u the median |s_p|, W and C the neighbouring pairs
within and across blocks, T the dropped points of runs behind each run's second. The weights a..e have Gaussian priors
(below), so the fit is a ridge regression towards the priors, and comes with an uncertainty.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_spd.sensitivity.neighbours import Prices, least_damage, typical

Array = NDArray[np.float64]

#: Priors (mean, standard deviation) of a, b, w, c, t: about what SmolLM2-135M shows at G = 3, 20 to 41 points dropped.
_SHARED = ((1.0, 0.3), (1.5, 0.7), (0.3, 0.5), (1.5, 1.0), (2.0, 1.5))
#: Standard deviation of a point's own correction d_p, in units of |s_p| + u, and of a pair's e_pp', in units of u.
_POINT_SD, _PAIR_SD = 0.5, 0.7
#: Standard deviation of the error: this many u, plus this much of the squared damage. A set that costs little is
#: predicted well; one that ruins the model says little about the others.
_ERROR_UNITS, _ERROR_SQUARE = 0.25, 0.1


class DamageModel:
    """Predicts the damage of sets out of the points of ``alone`` (point -> damage when only it is dropped)."""

    def __init__(self, alone: Mapping[int, float]) -> None:
        self.points = np.array(sorted(alone), dtype=np.int64)
        self._alone = np.array([alone[int(p)] for p in self.points], dtype=np.float64)
        self._unit = typical(self._alone.tolist())
        self._total = int(self.points[-1]) + 1 if len(self.points) else 1
        # Neighbours by their index in self.points: the first of each pair, and of each three in a row.
        steps = np.diff(self.points) == 1
        self._pairs = np.flatnonzero(steps)
        self._threes = np.flatnonzero(steps[:-1] & steps[1:])
        self._within = self.points[self._pairs] % 2 == 0
        n, pairs = len(self.points), len(self._pairs)
        self._mean = np.array([m for m, _ in _SHARED] + [0.0] * (n + pairs))
        own = _POINT_SD * (np.abs(self._alone) + self._unit)
        sd = [np.array([s for _, s in _SHARED]), own, np.full(pairs, _PAIR_SD * self._unit)]
        self._precision = 1 / np.concatenate(sd) ** 2
        self._weights, self._covariance = self._mean, np.diag(1 / self._precision)

    def members(self, sets: Sequence[Sequence[int]]) -> Array:
        """[sets, points]: 1 where a point is in a set."""
        members = np.zeros((len(sets), len(self.points)))
        for row, points in zip(members, sets, strict=True):
            row[np.searchsorted(self.points, points)] = 1.0
        return members

    def fit(self, sets: Sequence[Sequence[int]], damage: Sequence[float]) -> None:
        """Fit the weights to measured ``sets``; those of infinite damage teach nothing."""
        y = np.array(damage, dtype=np.float64)
        finite = np.isfinite(y)
        features = self._features(self.members(sets))[finite]
        y = y[finite]
        error = _ERROR_UNITS * self._unit + _ERROR_SQUARE * y**2
        weighed = features / error[:, None] ** 2
        self._covariance = np.linalg.inv(np.diag(self._precision) + weighed.T @ features)
        self._weights = self._mean + self._covariance @ (weighed.T @ (y - features @ self._mean))

    def predict(self, members: Array) -> tuple[Array, Array]:
        """Mean and standard deviation of the damage, each [sets], of sets given as :meth:`members` [sets, points]."""
        features = self._features(members)
        variance = ((features @ self._covariance) * features).sum(1)
        return features @ self._weights, np.sqrt(np.maximum(variance, 0.0))

    def best_set(self, count: int, prices: Prices | None = None) -> tuple[int, ...]:
        """The set of ``count`` points with the least predicted damage (exact), by what was learnt, or by the points'
        damage alone and ``prices`` (in medians)."""
        if prices is not None:
            scores = dict(zip(self.points.tolist(), self._alone.tolist(), strict=True))
            return least_damage(scores, prices.times(self._unit))[count][1]
        a, b, within, across, run = self._weights[: len(_SHARED)]
        points = len(_SHARED) + len(self.points)
        values = (a + b * count / self._total) * self._alone + self._weights[len(_SHARED) : points]
        scores = dict(zip(self.points.tolist(), values.tolist(), strict=True))
        first_of_pairs = self.points[self._pairs].tolist()
        pairs = dict(zip(first_of_pairs, self._weights[points:].tolist(), strict=True))
        learnt = Prices(float(within), float(across), float(run)).times(self._unit)
        return least_damage(scores, learnt, pairs)[count][1]

    def _features(self, members: Array) -> Array:
        """[sets, features], in the order of the formula."""
        pairs = members[:, self._pairs] * members[:, self._pairs + 1]
        threes = members[:, self._threes] * members[:, self._threes + 1] * members[:, self._threes + 2]
        total = members @ self._alone
        shared = np.stack(
            [
                total,
                total * members.sum(1) / self._total,
                self._unit * pairs[:, self._within].sum(1),
                self._unit * pairs[:, ~self._within].sum(1),
                self._unit * threes.sum(1),
            ],
            axis=1,
        )
        return np.concatenate([shared, members, pairs], axis=1)
