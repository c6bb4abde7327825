"""The search for the cheapest choice, on made-up models whose damages do not add up as predicted."""

from __future__ import annotations

import itertools
import json
import math
import random
from pathlib import Path

import pytest

from megatron_spd.errors import UserError
from megatron_spd.sensitivity.cheapest import CheapestResult, CheapestSearch, MeasuredChoice, damage_limit
from megatron_spd.sensitivity.measured_sets import Collectives, MeasuredCollectives
from megatron_spd.sensitivity.neighbours import Prices
from megatron_spd.sensitivity.optimize import PlanOptimizer

PLAIN = 20.0
COSTS = {"none": 0.0, "full": 4.0, "int8": 1.08, "int4": 0.81}


class MadeUpModel:
    """Damages add up, are multiplied by ``factor``, and every choice is off by up to ``noise`` of its damage. The
    perplexity itself rises by ``own`` times what the divergence stands for."""

    def __init__(self, points: int, seed: int, factor: float = 1.0, noise: float = 0.0, own: float = 1.0):
        rng = random.Random(seed)
        drops = {p: 0.01 * rng.lognormvariate(0, 1) for p in range(points - 1)}
        formats = {
            "int8": {p: 1e-5 * rng.lognormvariate(0, 1) for p in range(points)},
            "int4": {p: 2e-3 * rng.lognormvariate(0, 1) for p in range(points)},
        }
        self.optimizer = PlanOptimizer(points, drops, formats, COSTS, Prices(0.005, 0.03))
        self.factor, self.noise, self.own = factor, noise, own
        self.asked: list[Collectives] = []

    def figures(self, choice: Collectives) -> tuple[float, float]:
        off = 1 + self.noise * random.Random(repr(choice)).uniform(-1, 1)
        damage = self.factor * off * self.optimizer.damage(choice)
        return PLAIN * math.exp(damage), PLAIN * math.exp(self.own * damage)

    def __call__(self, choice: Collectives) -> tuple[float, float]:
        self.asked.append(choice)
        return self.figures(choice)

    def search(self, budget: int, state: Path | None = None, identity: str = "") -> CheapestSearch:
        store = MeasuredCollectives(state, identity)
        return CheapestSearch(self.optimizer, self, PLAIN, budget, store)


def assert_confirmed(model: MadeUpModel, found: CheapestResult, percent: float, budget: int) -> None:
    """The result is the cheapest of all that was measured to fit, by both figures."""
    limit = PLAIN * (1 + percent / 100)
    assert len(found.history) == len(model.asked) == len(set(model.asked)) <= budget
    best = found.best
    assert (best.equivalent, best.perplexity) == pytest.approx(model.figures(best.collectives))
    assert max(best.equivalent, best.perplexity) <= limit
    assert best.cost == pytest.approx(sum(COSTS[c] for c in best.collectives))
    fitting = [c for c in found.history if max(c.equivalent, c.perplexity) <= limit]
    assert best.cost <= min((c.cost for c in fitting), default=math.inf)


@pytest.mark.parametrize(("factor", "own"), [(1.0, 1.0), (0.3, 1.6), (3.0, 0.5)])
@pytest.mark.parametrize("percent", [0.5, 2.0, 20.0])
def test_the_choice_is_confirmed_within_the_budget(factor: float, own: float, percent: float) -> None:
    model = MadeUpModel(20, 1, factor, 0.05, own)
    found = model.search(10).within(percent)
    assert_confirmed(model, found, percent, 10)
    # As good as the choice that a search which knew the factor would take, to a tenth of its saving.
    known = model.optimizer.cheapest(damage_limit(percent) / (1.05 * factor * max(own, 1.0)))
    saved, possible = (20 * COSTS["full"] - c for c in (found.best.cost, model.optimizer.cost(known)))
    assert saved >= 0.9 * possible


@pytest.mark.parametrize("seed", range(2))
def test_of_an_honest_model_the_optimum_is_found(seed: int) -> None:
    model = MadeUpModel(5, seed)
    found = model.search(40).within(3.0)
    names = ("full", "int8", "int4", "none")
    every = [c for c in itertools.product(names, repeat=5) if c[-1] != "none"]
    costs = [sum(COSTS[x] for x in c) for c in every if damage_of(model, c) <= damage_limit(3.0)]
    assert found.best.cost == pytest.approx(min(costs))


def damage_of(model: MadeUpModel, choice: Collectives) -> float:
    try:
        return model.optimizer.damage(choice)
    except KeyError:  # a format that another one beats
        return math.inf


def test_a_larger_limit_is_never_dearer() -> None:
    costs = [MadeUpModel(12, 3, 2.0).search(30).within(p).best.cost for p in (0.0, 0.3, 5.0, 1e6)]
    assert costs == sorted(costs, reverse=True)
    assert costs[0] == 12 * COSTS["full"]
    assert costs[-1] == COSTS["int4"]  # all that can be dropped is


def test_nothing_fits() -> None:
    model = MadeUpModel(6, 0, factor=1e6)
    found = model.search(12).within(0.1)
    assert found.best == MeasuredChoice(("full",) * 6, 24.0, PLAIN, PLAIN, PLAIN)
    assert_confirmed(model, found, 0.1, 12)


def test_a_choice_that_overflows_is_passed_over() -> None:
    class Ruined(MadeUpModel):
        def figures(self, choice: Collectives) -> tuple[float, float]:
            return (math.nan, math.inf) if "none" in choice else super().figures(choice)

    found = Ruined(8, 2).search(20).within(5.0)
    assert "none" not in found.best.collectives
    assert any(math.isinf(c.confirmed) for c in found.history)
    assert found.best.cost < 8 * COSTS["int8"]


@pytest.mark.parametrize("killed_after", [0, 1, 4])
def test_a_killed_search_goes_on_without_repeating(tmp_path: Path, killed_after: int) -> None:
    model = MadeUpModel(20, 5, 1.7, 0.05)
    whole = model.search(8).within(3.0)
    expected, model.asked = model.asked, []
    assert len(expected) > 4

    def dies(choice: Collectives) -> tuple[float, float]:
        if len(model.asked) == killed_after:
            raise KeyboardInterrupt
        return model(choice)

    state = tmp_path / "sets.json"
    store = MeasuredCollectives(state, "a")
    with pytest.raises(KeyboardInterrupt):
        CheapestSearch(model.optimizer, dies, PLAIN, 8, store).within(3.0)
    assert model.search(8, state, "a").within(3.0) == whole
    assert model.asked == expected
    kept = json.loads(state.read_text())["sets"]
    assert [tuple(s["sync_points"]) for s in kept] == expected


def test_progress_hears_of_every_choice() -> None:
    model = MadeUpModel(10, 6)
    told: list[MeasuredChoice] = []
    store = MeasuredCollectives(None, "")
    found = CheapestSearch(model.optimizer, model, PLAIN, 9, store, told.append).within(2.0)
    assert tuple(told) == found.history
    assert [c.collectives for c in told] == model.asked
    assert all(
        c.predicted == pytest.approx(PLAIN * math.exp(model.optimizer.damage(c.collectives))) for c in told
    )


@pytest.mark.parametrize("percent", [-1.0, math.nan, math.inf])
def test_bad_percentage(percent: float) -> None:
    with pytest.raises(UserError, match=r"perplexity increase of .* expected a number >= 0"):
        MadeUpModel(4, 0).search(3).within(percent)


def test_bad_budget() -> None:
    with pytest.raises(UserError, match="budget of 0"):
        MadeUpModel(4, 0).search(0)
