"""The optimiser against every choice there is, on small made-up problems."""

from __future__ import annotations

import itertools
import random

import pytest

from megatron_spd.sensitivity.neighbours import Prices
from megatron_spd.sensitivity.optimize import PlanOptimizer

POINTS = 6
BYTES = {"none": 0.0, "full": 4.0, "int8": 1.08, "int4": 0.81}
#: Two calls cost more than one: int8 is dearer than full.
LATENCY = {"none": 0.0, "full": 2.5, "int8": 2.8, "int4": 2.1}
PRICES = [Prices(0.0, 0.0), Prices(0.3, 1.5), Prices(0.4, 1.0, 2.0)]
Choice = tuple[str, ...]


def problem(seed: int, costs: dict[str, float], prices: Prices) -> PlanOptimizer:
    """Points 0..4 may be dropped, all but point 1 may be low-bit, and point 3 gains by int8."""
    rng = random.Random(seed)
    drops = {p: rng.lognormvariate(0, 1) for p in range(POINTS - 1)}
    formats = {
        "int8": {p: 0.02 * rng.lognormvariate(0, 1) for p in range(POINTS) if p != 1},
        "int4": {p: 0.3 * rng.lognormvariate(0, 1) for p in range(POINTS) if p != 1},
    }
    formats["int8"][3] *= -1
    return PlanOptimizer(POINTS, drops, formats, costs, prices)


def all_choices() -> list[Choice]:
    per_point = [["full", "int8", "int4", "none"] for _ in range(POINTS)]
    per_point[1] = ["full", "none"]
    per_point[-1] = ["full", "int8", "int4"]
    return list(itertools.product(*per_point))


def damage(seed: int, prices: Prices, choice: Choice) -> float:
    """The formula, written down once more."""
    rng = random.Random(seed)
    drops = {p: rng.lognormvariate(0, 1) for p in range(POINTS - 1)}
    eight = {p: 0.02 * rng.lognormvariate(0, 1) for p in range(POINTS) if p != 1} | {3: 0.0}
    four = {p: 0.3 * rng.lognormvariate(0, 1) for p in range(POINTS) if p != 1}
    alone = {"full": dict.fromkeys(range(POINTS), 0.0), "none": drops, "int8": eight, "int4": four}
    total = sum(alone[c][p] for p, c in enumerate(choice))
    run = 0
    for p, c in enumerate(choice):
        run = run + 1 if c == "none" else 0
        if run >= 2:
            total += prices.across if p % 2 == 0 else prices.within
        if run >= 3:
            total += prices.run
    return total


@pytest.mark.parametrize("prices", PRICES)
@pytest.mark.parametrize("costs", [BYTES, LATENCY], ids=["bytes", "latency"])
@pytest.mark.parametrize("seed", range(3))
def test_the_cheapest_choice_is_the_best_of_all(seed: int, costs: dict[str, float], prices: Prices) -> None:
    optimizer = problem(seed, costs, prices)
    # Rounded: the order of a sum must not decide between equal costs.
    every = [
        (round(sum(costs[c] for c in choice), 9), damage(seed, prices, choice)) for choice in all_choices()
    ]
    for allowance in (0.0, 0.05, 0.4, 1.5, 4.0, 100.0):
        found = optimizer.cheapest(allowance)
        cost, least = min(pair for pair in every if pair[1] <= allowance)
        assert optimizer.cost(found) == pytest.approx(cost)
        assert optimizer.damage(found) == pytest.approx(damage(seed, prices, found)) == pytest.approx(least)
        assert optimizer.cheapest(allowance) == found
    assert optimizer.greatest_damage >= max(d for _, d in every) - 1e-9


def test_neighbours_are_dropped_where_their_price_is_worth_it() -> None:
    drops = {0: 1.0, 1: 1.0, 3: 1.1}
    costs = {"none": 0.0, "full": 1.0}
    apart = PlanOptimizer(4, drops, {}, costs, Prices(within=0.2, across=0.0))
    together = PlanOptimizer(4, drops, {}, costs, Prices(within=0.05, across=0.0))
    assert apart.cheapest(2.15) in (("none", "full", "full", "none"), ("full", "none", "full", "none"))
    assert together.cheapest(2.15) == ("none", "none", "full", "full")
    # Not neighbours: point 2 between them cannot be dropped.
    assert PlanOptimizer(4, drops, {}, costs, Prices(9.0, 9.0, 9.0)).damage(
        ("full", "none", "full", "none")
    ) == pytest.approx(2.1)


def test_a_format_that_saves_nothing_is_never_chosen() -> None:
    low_bit = {"int8": {0: 0.0, 1: 0.0}, "int4": {0: 0.0, 1: 0.5}}
    costs = {"none": 0.0, "full": 1.0, "int8": 1.0, "int4": 0.5}
    optimizer = PlanOptimizer(2, {}, low_bit, costs, Prices(0.0, 0.0))
    assert optimizer.cheapest(0.1) == ("int4", "full")


def test_points_that_ruin_a_model_leave_the_others_exact() -> None:
    """Damages of very different sizes: the limit is kept to a small part of the smallest."""
    drops = {0: 50.0, 1: 1.00001e-4, 2: 700.0, 3: 1e-4}
    optimizer = PlanOptimizer(4, drops, {}, {"none": 0.0, "full": 1.0}, Prices(0.0, 0.0))
    assert optimizer.cheapest(1e-4) == ("full", "full", "full", "none")
    assert optimizer.cheapest(2.00002e-4) == ("full", "none", "full", "none")
    assert optimizer.cheapest(1000.0) == ("none",) * 4


def test_points_without_scores_stay_full() -> None:
    optimizer = PlanOptimizer(3, {1: 0.5}, {}, {"none": 0.0, "full": 1.0}, Prices(0.0, 0.0))
    assert optimizer.cheapest(10.0) == ("full", "none", "full")
    nothing = PlanOptimizer(2, {}, {}, {"none": 0.0, "full": 1.0}, Prices(0.0, 0.0))
    assert nothing.cheapest(1.0) == ("full", "full")
    assert nothing.greatest_damage == 0.0


def test_negative_prices_are_refused() -> None:
    with pytest.raises(ValueError, match="prices of at least 0"):
        PlanOptimizer(2, {}, {}, BYTES, Prices(-1.0, 0.0))
