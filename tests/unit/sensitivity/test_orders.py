"""Two orders of the same points."""

from __future__ import annotations

import pytest
from scipy.stats import spearmanr

from megatron_spd.sensitivity.orders import compare_orders


def test_ranks_and_correlation() -> None:
    before = {0: 5.0, 3: -1.0, 4: 2.0, 7: 2.0}
    after = {0: 0.1, 3: 0.0, 4: 3.0, 7: 0.5}
    found = compare_orders(before, after)
    assert found["points"][0] == {"point": 0, "before": 5.0, "after": 0.1, "rank_before": 4, "rank_after": 2}
    assert [p["point"] for p in found["points"]] == [0, 3, 4, 7]
    assert [p["rank_before"] for p in found["points"]] == [4, 1, 2.5, 2.5]
    expected = spearmanr(list(before.values()), list(after.values())).statistic
    assert found["spearman"] == pytest.approx(expected)


def test_the_same_and_the_opposite_order() -> None:
    scores = {p: float(p) for p in range(5)}
    assert compare_orders(scores, {p: v**3 for p, v in scores.items()})["spearman"] == pytest.approx(1)
    assert compare_orders(scores, {p: -v for p, v in scores.items()})["spearman"] == pytest.approx(-1)


def test_scores_that_say_nothing_have_no_correlation() -> None:
    assert compare_orders({0: 1.0, 1: 1.0}, {0: 1.0, 1: 2.0})["spearman"] is None


def test_other_points_are_refused() -> None:
    with pytest.raises(ValueError, match="the same points"):
        compare_orders({0: 1.0}, {2: 1.0})
