"""How the order of sensitivity changes: the same points scored in two ways."""

from __future__ import annotations

from typing import Any

from megatron_spd.sensitivity.tiers import Scores


def compare_orders(before: Scores, after: Scores) -> dict[str, Any]:
    """The scores of the same points before and after, and how alike their orders are.

    Returns:
        ``points``: for each point in the model's order ``point``, ``before`` and ``after`` (rises in perplexity),
        ``rank_before`` and ``rank_after`` (1: the least sensitive; equal scores share the mean rank); ``spearman``:
        Spearman's rank correlation, None where one of the two says nothing (all scores equal).

    Raises:
        ValueError: the points are not the same.
    """
    from scipy.stats import rankdata  # takes a second to import

    if before.keys() != after.keys():
        raise ValueError(f"{len(before)} points before, {len(after)} after; expected the same points")
    points = sorted(before)
    ranks = [rankdata([scores[p] for p in points]).tolist() for scores in (before, after)]
    rows = [
        {"point": p, "before": before[p], "after": after[p], "rank_before": a, "rank_after": b}
        for p, a, b in zip(points, *ranks, strict=True)
    ]
    return {"points": rows, "spearman": _correlation(*ranks)}


def _correlation(x: list[float], y: list[float]) -> float | None:
    """Pearson's correlation; of ranks, Spearman's."""
    a, b = ([v - sum(values) / len(values) for v in values] for values in (x, y))
    size = (sum(v * v for v in a) * sum(v * v for v in b)) ** 0.5
    return sum(v * w for v, w in zip(a, b, strict=True)) / size if size else None
