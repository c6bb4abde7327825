"""Choosing points and tiers from sensitivities: against brute force, the stated rules, the stated errors."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_spd.errors import UserError
from megatron_spd.sensitivity.tiers import (
    NEIGHBOUR_PRICES,
    PAPER_THRESHOLDS,
    Thresholds,
    block_tiers,
    choose_points,
    drop_count,
    droppable_points,
    find_thresholds,
    low_bit_scores,
    points_up_to,
    points_within_budget,
    scores_from,
    sync_points,
    tier,
)

FINITE = st.floats(-1e3, 1e6, allow_nan=False, allow_subnormal=False)


# ---- points that may be dropped, and how many --------------------------------------------------------------


def test_droppable_points():
    assert droppable_points(3, "attention") == [0, 2, 4]
    assert droppable_points(3, "mlp") == [1, 3]
    assert droppable_points(3, "any") == [0, 1, 2, 3, 4]
    with pytest.raises(UserError, match=r"'both'.*any.*attention.*mlp"):
        droppable_points(3, "both")


def test_every_point_may_be_low_bit():
    assert sync_points(3, "attention") == [0, 2, 4]
    assert sync_points(3, "mlp") == [1, 3, 5]
    assert sync_points(3, "any") == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("droppable", "ratio", "count"),
    [(30, 0.7, 21), (30, 0, 0), (30, 1, 30), (29, 0.7, 20), (59, 0.7, 41), (5, 0.5, 3)],
)
def test_drop_count(droppable, ratio, count):
    assert drop_count(droppable, ratio) == count


@pytest.mark.parametrize("ratio", [-0.1, 1.01, math.nan])
def test_bad_ratio(ratio):
    with pytest.raises(UserError, match="drop ratio"):
        drop_count(30, ratio)


# ---- scores out of a measurement ----------------------------------------------------------------------------------

MEASURED = {
    "plain_perplexity": 20.0,
    "num_layers": 2,
    "algorithm1": [{"block": i, "perplexity": 21.0 + i, "sensitivity": 1.0 + i} for i in range(2)],
    "single": [{"point": p, "block": p // 2, "perplexity": 20.0, "sensitivity": 0.1 * p} for p in range(3)],
}


def test_scores_from_a_measurement():
    assert scores_from(MEASURED, "attention") == {0: 1.0, 2: 2.0}
    assert scores_from(MEASURED | {"algorithm1": None}, "attention") == {0: 0.0, 2: 0.2}
    assert scores_from(MEASURED, "mlp") == {1: 0.1}
    assert scores_from(MEASURED, "any") == {0: 0.0, 1: 0.1, 2: 0.2}
    # The last block has no MLP point that can be dropped, and counts all the same.
    mlp_only = [{"point": p, "block": p // 2, "sensitivity": 0.1 * p} for p in (1, 3)]
    assert scores_from({"num_layers": 3, "single": mlp_only}, "mlp") == pytest.approx({1: 0.1, 3: 0.3})


@pytest.mark.parametrize("single", [None, MEASURED["single"][:1]])
def test_scores_that_were_not_measured(single):
    with pytest.raises(UserError, match=r"no scores .* 'any' .*--sync-points any"):
        scores_from(MEASURED | {"single": single}, "any")


# ---- choosing ----------------------------------------------------------------------------------------------


def test_cheapest_points_in_order_and_ties_by_place():
    scores = {0: 5.0, 2: 0.1, 4: -0.2, 6: 0.1, 8: 3.0}
    assert choose_points(scores, 0, False) == []
    assert choose_points(scores, 2, False) == [2, 4]
    assert choose_points(scores, 4, False) == [2, 4, 6, 8]


def predicted(scores, points):
    """The documented prediction, written out: scores plus the price, in median scores, of each neighbouring pair."""
    prices = {0: NEIGHBOUR_PRICES.within, 1: NEIGHBOUR_PRICES.across}
    pairs = sum(prices[a % 2] for a, b in itertools.pairwise(sorted(points)) if b - a == 1)
    median = sorted(abs(s) for s in scores.values())[len(scores) // 2]
    return sum(scores[p] for p in points) + median * pairs


@pytest.mark.parametrize("seed", range(12))
def test_choice_that_avoids_neighbours_is_the_best_of_all(seed):
    rng = random.Random(seed)
    points = sorted(rng.sample(range(13), rng.randint(3, 11)))
    scores = {p: rng.choice([rng.uniform(-0.5, 1), rng.uniform(0, 10)]) for p in points}
    for count in range(len(points) + 1):
        chosen = choose_points(scores, count, True)
        assert chosen == sorted(set(chosen))
        assert len(chosen) == count
        best = min(predicted(scores, c) for c in itertools.combinations(points, count))
        assert predicted(scores, chosen) == pytest.approx(best)


def test_greedy_would_miss_the_best_choice():
    scores = {1: 2.0, 2: 1.0, 3: 2.0, 4: 50.0}
    assert choose_points(scores, 2, True) == [1, 3]
    assert choose_points(scores, 2, False) == [1, 2]


def test_neighbours_are_better_than_ruin():
    """Free of neighbours while that is cheap; the point that ruins the model comes last, not with the first pair."""
    scores = {0: 400.0, 1: 1.0, 2: 1.0, 3: 1.0, 4: 1.0, 5: 1.0}
    assert choose_points(scores, 3, True) == [1, 3, 5]
    assert choose_points(scores, 4, True) == [1, 2, 3, 5]
    assert choose_points(scores, 5, True) == [1, 2, 3, 4, 5]
    assert choose_points(scores, 6, True) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("count", [-1, 4])
def test_count_out_of_range(count):
    with pytest.raises(UserError, match="the sensitivities cover 3"):
        choose_points({0: 1.0, 2: 1.0, 4: 1.0}, count, False)


# ---- thresholds --------------------------------------------------------------------------------------------


def test_jumps_are_found():
    """Sums of the figures of the paper's kind: a flat majority, a middle class, a few extreme blocks."""
    flat = [0.05, 0.02, 0.08, 0.11, -0.03, 0.09, 0.1, 0.12, 0.07, 0.13]
    scores = dict(enumerate([*flat, 3.0, 4.0, 150.0, 400.0]))
    found = find_thresholds(scores)
    assert 0.13 < found.tau1 < 3.0
    assert 4.0 < found.tau2 < 150.0


def test_thresholds_scale_with_the_scores():
    scores = {0: 0.1, 2: 0.2, 4: 2.0, 6: 2.5, 8: 90.0}
    small, large = find_thresholds(scores), find_thresholds({p: 40 * s for p, s in scores.items()})
    assert large.tau1 == pytest.approx(40 * small.tau1)
    assert large.tau2 == pytest.approx(40 * small.tau2)


def test_few_distinct_scores():
    assert find_thresholds({0: 0.5, 2: 0.5}) == Thresholds(0.5, 0.5)
    assert find_thresholds({0: 0.0}) == Thresholds(0.0, 0.0)
    two = find_thresholds({0: 0.5, 2: 0.5, 4: 8.0})
    assert 0.5 < two.tau1 < 8.0
    assert two.tau2 == 8.0


@given(st.lists(FINITE, min_size=1, max_size=40))
def test_thresholds_split_into_ordered_tiers(values):
    scores = dict(enumerate(values))
    found = find_thresholds(scores)
    tiers = [tier(s, found) for s in sorted(values)]
    assert tiers == sorted(tiers, key=["ISB", "SB", "ESB"].index)
    assert tiers[0] == "ISB"


def test_scores_that_almost_agree():
    """The scale can make neighbours of different scores equal: then there are fewer steps."""
    values = [1.0, 1.0, 1.0, 1e6, math.nextafter(1e6, 2e6)]
    assert math.asinh(values[3]) == math.asinh(values[4])
    found = find_thresholds(dict(enumerate(values)))
    assert [tier(s, found) for s in values] == ["ISB", "ISB", "ISB", "SB", "SB"]


# ---- tiers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("score", "expected"), [(-1.0, "ISB"), (0.05, "ISB"), (0.0501, "SB"), (10.0, "SB"), (10.1, "ESB")]
)
def test_tier_edges(score, expected):
    assert tier(score, PAPER_THRESHOLDS) == expected


def test_block_tier_is_that_of_the_summed_damage():
    scores = {0: 41.0, 2: 0.04, 3: 0.04, 4: 0.04, 5: 7.0, 6: 0.01}
    tiers = block_tiers(scores, [0, 2, 3, 4, 6], PAPER_THRESHOLDS)
    assert tiers == {0: "ESB", 1: "SB", 2: "ISB", 3: "ISB"}
    with pytest.raises(UserError, match="sync point 8"):
        block_tiers(scores, [8], PAPER_THRESHOLDS)


# ---- limits and budgets ------------------------------------------------------------------------------------


def test_points_up_to_a_limit():
    assert points_up_to({0: 41.0, 2: 0.3, 4: -0.1, 6: 10.0}, 10.0) == [2, 4, 6]


def test_budget_takes_as_many_as_fit():
    scores = {0: 5.0, 2: 0.3, 4: 0.2, 6: 0.6}
    assert points_within_budget(scores, 20.0, 2.5) == [2, 4]
    assert points_within_budget(scores, 20.0, 5.6) == [2, 4, 6]
    assert points_within_budget(scores, 20.0, 0.5) == []
    assert points_within_budget(scores, 20.0, 100) == [0, 2, 4, 6]


def test_a_gain_pays_for_no_loss():
    scores = {0: -5.0, 2: 0.3, 4: 0.4}
    assert points_within_budget(scores, 10.0, 0) == [0]
    assert points_within_budget(scores, 10.0, 3.5) == [0, 2]


def test_budget_counts_what_neighbours_cost():
    scores = {0: 0.5, 1: 0.5, 2: 0.5, 3: 9.0}
    assert points_within_budget(scores, 10.0, 16) == [0, 1, 2]
    assert points_within_budget(scores, 10.0, 16, avoid_neighbours=True) == [0, 2]
    assert points_within_budget(scores, 10.0, 36, avoid_neighbours=True) == [0, 1, 2]


@given(st.dictionaries(st.integers(0, 20), FINITE, max_size=12), st.floats(0, 1e4))
def test_budget_is_kept_and_used_up(scores, percent):
    budget = 50.0 * percent / 100
    chosen = points_within_budget(scores, 50.0, percent)
    damage = sorted(max(0.0, s) for s in scores.values())
    assert sorted(max(0.0, scores[p]) for p in chosen) == damage[: len(chosen)]
    assert sum(damage[: len(chosen)]) <= budget
    assert len(chosen) == len(scores) or sum(damage[: len(chosen) + 1]) > budget


@pytest.mark.parametrize(("plain", "percent"), [(0.0, 1.0), (math.nan, 1.0), (20.0, -1.0), (20.0, math.nan)])
def test_budget_errors(plain, percent):
    with pytest.raises(UserError, match="expected a number"):
        points_within_budget({0: 1.0}, plain, percent)


# ---- low-bit scores ------------------------------------------------------------------------------------------------


def low_bit_measurement(points, names=("int8", "int4")):
    entries = [{"point": p, "collective": n, "sensitivity": p + len(n) / 10} for p in points for n in names]
    return {"num_layers": 2, "low_bit": entries}


def test_low_bit_scores_by_format_and_point():
    measured = low_bit_measurement(range(4))
    assert low_bit_scores(measured, "mlp", ["int4"]) == {"int4": {1: 1.4, 3: 3.4}}
    assert low_bit_scores(measured, "any", ["int8", "int4"])["int8"] == {0: 0.4, 1: 1.4, 2: 2.4, 3: 3.4}
    assert low_bit_scores({"num_layers": 2}, "any", []) == {}


@pytest.mark.parametrize(
    ("measured", "which", "names", "missing"),
    [
        ({"num_layers": 2}, "any", ["int8"], "int8"),
        ({"num_layers": 2, "low_bit": None}, "any", ["int8", "int4"], "int8, int4"),
        (low_bit_measurement(range(4)), "any", ["int8", "int6"], "int6"),
        (low_bit_measurement([0, 2]), "any", ["int8"], "int8"),
    ],
)
def test_formats_that_were_not_measured(measured, which, names, missing):
    with pytest.raises(
        UserError, match=f"no low-bit scores of {missing} at .*--collectives {','.join(names)} "
    ):
        low_bit_scores(measured, which, names)
