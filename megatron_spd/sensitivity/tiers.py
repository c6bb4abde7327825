"""From sensitivities to decisions: which sync points to drop, and which tier a block is in.

A score is the rise in perplexity that dropping one sync point brings (method section 2): from Algorithm 1 for
attention points, from single-point measurements for any. Scores add up only roughly, and least so for
neighbouring points, whose damage compounds (method section 9); that is why :func:`choose_points` can avoid
neighbours. Pure Python.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_spd.errors import UserError
from megatron_spd.sensitivity.neighbours import Choice, Prices, least_damage, typical

#: Sync point -> rise in perplexity.
Scores = Mapping[int, float]

#: What neighbouring dropped points are predicted to cost beyond their own scores, in median scores. SmolLM2-135M, 20
#: to 29 points dropped: better sets than one price for all pairs. Much larger values (no neighbours at any price) make
#: large choices take the few points that ruin a model.
NEIGHBOUR_PRICES = Prices(within=0.5, across=3.0)


@dataclass(frozen=True)
class Thresholds:
    """Upper ends, in perplexity, of tier ISB (``tau1``) and tier SB (``tau2``)."""

    tau1: float
    tau2: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.tau1) and math.isfinite(self.tau2) and self.tau1 <= self.tau2):
            raise UserError(
                f"tau1 = {self.tau1:g} and tau2 = {self.tau2:g}; expected finite numbers, tau1 <= tau2"
            )


#: The thresholds of the paper (method section 2), chosen by its authors for LLaMA2 and OPT.
PAPER_THRESHOLDS = Thresholds(tau1=0.05, tau2=10.0)


def sync_points(num_layers: int, which: str) -> list[int]:
    """The sync points of ``which`` (attention, mlp, any), ascending. Raises UserError for anything else."""
    first_and_step = {"attention": (0, 2), "mlp": (1, 2), "any": (0, 1)}
    if which not in first_and_step:
        raise UserError(f"sync points {which!r}; expected one of {sorted(first_and_step)}")
    first, step = first_and_step[which]
    return list(range(first, 2 * num_layers, step))


def droppable_points(num_layers: int, which: str) -> list[int]:
    """Those of :func:`sync_points` that a plan may drop.

    The last MLP point is never among them: what is pending at the end of the model is synced there.
    """
    return [p for p in sync_points(num_layers, which) if p < 2 * num_layers - 1]


def scores_from(sensitivity: Mapping[str, Any], which: str) -> dict[int, float]:
    """The scores to decide by, out of the JSON of a sensitivity measurement.

    Attention points alone (the paper): Algorithm 1 where it was run, else each point alone. ``mlp`` and
    ``any``: each point alone.

    Raises:
        UserError: ``which`` is unknown, or a droppable point of it was not measured.
    """
    measured: dict[int, float] = {}
    if which == "attention" and sensitivity.get("algorithm1"):
        measured = {2 * e["block"]: e["sensitivity"] for e in sensitivity["algorithm1"]}
    elif sensitivity.get("single"):
        measured = {e["point"]: e["sensitivity"] for e in sensitivity["single"]}
    droppable = droppable_points(sensitivity["num_layers"], which)
    wanted = [p for p in droppable if p not in measured]
    if wanted:
        raise UserError(
            f"the sensitivity file has no scores for {len(wanted)} of the sync points that '{which}' may drop "
            f"(first: {wanted[0]}); measure again with `megatron-spd sensitivity --sync-points {which}`"
        )
    return {p: measured[p] for p in droppable}


def low_bit_by_format(sensitivity: Mapping[str, Any]) -> dict[str, dict[int, float]]:
    """Rise in perplexity by low-bit format and sync point, whatever was measured, formats in their order."""
    found: dict[str, dict[int, float]] = {}
    for entry in sensitivity.get("low_bit") or ():
        found.setdefault(entry["collective"], {})[entry["point"]] = float(entry["sensitivity"])
    return found


def low_bit_scores(
    sensitivity: Mapping[str, Any], which: str, collectives: Sequence[str]
) -> dict[str, dict[int, float]]:
    """Rise in perplexity by low-bit format and sync point of ``which``, out of the JSON of a sensitivity measurement.

    Raises:
        UserError: a format was not measured at one of the points.
    """
    measured = low_bit_by_format(sensitivity)
    points = sync_points(sensitivity["num_layers"], which)
    missing = [name for name in collectives if any(p not in measured.get(name, {}) for p in points)]
    if missing:
        raise UserError(
            f"the sensitivity file has no low-bit scores of {', '.join(missing)} at all points of '{which}'; measure "
            f"again with `megatron-spd sensitivity --collectives {','.join(collectives)} --sync-points {which}`"
        )
    return {name: {p: measured[name][p] for p in points} for name in collectives}


def drop_count(droppable: int, ratio: float) -> int:
    """How many of ``droppable`` points a drop ratio (share, 0..1) means: the nearest number, half rounds up."""
    if not 0 <= ratio <= 1:
        raise UserError(f"drop ratio {ratio:g}; expected a share between 0 and 1")
    return math.floor(ratio * droppable + 0.5)


def tier(score: float, thresholds: Thresholds) -> str:
    """ISB, SB or ESB (method section 2) for the damage ``score`` of what is dropped in a block."""
    if score <= thresholds.tau1:
        return "ISB"
    return "SB" if score <= thresholds.tau2 else "ESB"


def block_tiers(scores: Scores, dropped: Sequence[int], thresholds: Thresholds) -> dict[int, str]:
    """Block -> tier of the sum of its dropped points' scores, for every block that has a dropped point."""
    damage: dict[int, float] = {}
    for point in sorted(dropped):
        damage[point // 2] = damage.get(point // 2, 0.0) + _score(scores, point)
    return {block: tier(total, thresholds) for block, total in damage.items()}


def find_thresholds(scores: Scores) -> Thresholds:
    """tau1 and tau2 at the two jumps of the sorted curve, the authors' choice by eye made a rule.

    The sorted scores s are put on a scale that is linear around zero and logarithmic above, asinh(s / m) with
    m the median of |s|, so that neither noise near zero nor the largest score decides alone. The staircase of
    three levels that fits the sorted curve best (least squares, exact search) has two steps; each threshold
    lies halfway, on that scale, between the scores on either side of a step. With two distinct scores there
    is one step and no ESB; with one, all are ISB.

    Raises:
        UserError: no scores, or one that is not finite.
    """
    values = sorted(scores.values())
    if not values:
        raise UserError("no sensitivity scores to find thresholds in; measure at least one sync point")
    for point, score in scores.items():
        if not math.isfinite(score):
            raise UserError(f"the sensitivity of sync point {point} is {score}; expected a finite number")
    unit = typical(scores.values())
    curve = [math.asinh(v / unit) for v in values]
    taus = []
    for i in _staircase_steps(curve, min(3, len(set(curve)))):
        halfway = unit * math.sinh((curve[i - 1] + curve[i]) / 2)
        # Rounding can push the halfway point out from between two scores that almost agree.
        taus.append(halfway if values[i - 1] <= halfway < values[i] else values[i - 1])
    taus += [values[-1]] * (2 - len(taus))
    return Thresholds(*taus)


def choose_points(scores: Scores, count: int, avoid_neighbours: bool) -> list[int]:
    """The ``count`` points to drop, ascending: those with the least predicted damage (exact).

    The prediction is the sum of the scores; with ``avoid_neighbours`` plus :data:`NEIGHBOUR_PRICES` for
    neighbouring points of the choice. Choices are then free of neighbours for as long as that is cheaper
    than to take a point whose own score is worse.

    Raises:
        UserError: ``count`` is not in 0..len(scores).
    """
    if not 0 <= count <= len(scores):
        raise UserError(f"{count} sync points to drop; the sensitivities cover {len(scores)}")
    return list(_choices(scores, avoid_neighbours)[count][1])


def points_up_to(scores: Scores, limit: float) -> list[int]:
    """The points whose score is at most ``limit`` (perplexity), ascending; for tau2 all but the ESB."""
    return sorted(p for p, score in scores.items() if score <= limit)


def points_within_budget(
    scores: Scores, plain_perplexity: float, max_increase_percent: float, avoid_neighbours: bool = False
) -> list[int]:
    """The largest choice of :func:`choose_points` that is predicted to cost at most ``max_increase_percent``.

    The predicted damage is taken in percent of ``plain_perplexity``. A negative score counts as zero: a gain
    on one sample pays for no loss.

    Raises:
        UserError: a negative or not finite budget, or a plain perplexity that is not positive.
    """
    if not (math.isfinite(max_increase_percent) and max_increase_percent >= 0):
        raise UserError(f"a perplexity increase of {max_increase_percent} %; expected a number >= 0")
    if not (math.isfinite(plain_perplexity) and plain_perplexity > 0):
        raise UserError(f"a plain perplexity of {plain_perplexity}; expected a number > 0")
    budget = plain_perplexity * max_increase_percent / 100
    choices = _choices({p: max(0.0, score) for p, score in scores.items()}, avoid_neighbours)
    # The damage grows with the count: leaving a point out never costs.
    return list([points for damage, points in choices if damage <= budget][-1])


def _score(scores: Scores, point: int) -> float:
    if point not in scores:
        raise UserError(f"no sensitivity was measured for sync point {point}; measure it or do not drop it")
    return scores[point]


def _staircase_steps(curve: Sequence[float], levels: int) -> list[int]:
    """Where the least-squares staircase of ``levels`` (1..3) levels over an ascending curve steps: the first index of
    every level but the first."""
    n = len(curve)
    sums, squares = [0.0], [0.0]
    for value in curve:
        sums.append(sums[-1] + value)
        squares.append(squares[-1] + value * value)

    def error(start: int, stop: int) -> float:
        return squares[stop] - squares[start] - (sums[stop] - sums[start]) ** 2 / (stop - start)

    # Equal scores belong to one tier: steps only where the curve rises.
    rises = [i for i in range(1, n) if curve[i - 1] < curve[i]]
    if levels == 1:
        return []
    if levels == 2:
        return [min(rises, key=lambda i: error(0, i) + error(i, n))]
    pairs = ((i, j) for k, i in enumerate(rises) for j in rises[k + 1 :])
    first, second = min(pairs, key=lambda p: error(0, p[0]) + error(p[0], p[1]) + error(p[1], n))
    return [first, second]


def _choices(scores: Scores, avoid_neighbours: bool) -> list[Choice]:
    """The best choice of every size 0..len(scores)."""
    if avoid_neighbours:
        return least_damage(scores, NEIGHBOUR_PRICES.times(typical(scores.values())))
    cheapest = sorted(scores, key=lambda p: (scores[p], p))
    damage = [0.0, *itertools.accumulate(scores[p] for p in cheapest)]
    return [(total, tuple(sorted(cheapest[:k]))) for k, total in enumerate(damage)]
