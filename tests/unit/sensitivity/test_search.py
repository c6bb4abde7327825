"""The search on made-up models whose best sets are known or can be found by trying all."""

from __future__ import annotations

import itertools
import json
import math
import random
import statistics

import numpy as np
import pytest

from megatron_spd.errors import UserError
from megatron_spd.sensitivity.search import MeasuredSet, Search

PLAIN = 20.0


class MadeUpModel:
    """Perplexity by dropped set: points, pairs within and across blocks, runs, growth with the number of drops, and
    (``noise``) something of its own for every two points that no score tells of. Counts its measurements."""

    def __init__(self, points, seed, noise=0.0, ruinous=()):
        rng = np.random.default_rng(seed)
        n = max(points) + 1
        self.alone = np.abs(rng.normal(0.015, 0.01, n))
        self.alone[list(ruinous)] = 1.0
        self.pair = np.where(np.arange(n) % 2 == 0, rng.normal(0.003, 0.006, n), rng.normal(0.025, 0.015, n))
        self.run = np.abs(rng.normal(0.03, 0.02, n))
        self.far = np.triu(rng.normal(0, noise, (n, n)), 2)
        self.points, self.size = tuple(points), n
        self.asked: list[tuple[int, ...]] = []

    def __call__(self, points):
        self.asked.append(points)
        return self.perplexity(points)

    def perplexity(self, points):
        x = np.zeros(self.size + 2)
        x[list(points)] = 1
        m = x[: self.size]
        y = (1 + 1.2 * m.sum() / self.size) * (self.alone @ m) + m @ self.far @ m
        y += self.pair @ (m * x[1:-1]) + self.run @ (m * x[1:-1] * x[2:])
        return PLAIN * math.exp(y)

    def scores(self):
        return {p: self.perplexity((p,)) - PLAIN for p in self.points}

    def search(self, budget, **more):
        return Search(self.scores(), self, PLAIN, budget, **more)


# ---- a set of a given size ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_the_best_of_all_sets_of_a_small_model_is_found(seed):
    model = MadeUpModel(range(12), seed)
    for count in (3, 6, 9):
        best = min(itertools.combinations(range(12), count), key=model.perplexity)
        found = model.search(80).best_of_size(count)
        assert found.points == best
        assert found.perplexity == model.perplexity(best)


@pytest.mark.parametrize("count", [15, 24, 30, 41])
def test_never_worse_than_its_best_start(count):
    model = MadeUpModel(range(59), seed=count, noise=0.002)
    found = model.search(20).best_of_size(count)
    starts = [m.perplexity for m in found.history if m.origin == "start"]
    assert 1 <= len(starts) <= 5
    assert found.perplexity < min(starts)
    assert found.perplexity == min(m.perplexity for m in found.history) == model.perplexity(found.points)
    assert len(found.points) == len(set(found.points)) == count


def random_exchanges(model, start, budget):
    """The plain alternative: random exchanges, kept when they are better."""
    rng = random.Random(0)
    best, points = model.perplexity(start), start
    for _ in range(budget):
        inside, outside = rng.choice(points), rng.choice([p for p in model.points if p not in points])
        tried = tuple(sorted({*points, outside} - {inside}))
        if model.perplexity(tried) < best:
            best, points = model.perplexity(tried), tried
    return best


def test_the_model_is_worth_its_trouble():
    """The same measurements spent on random exchanges from the best start gain less than half as much: in log
    perplexity, mean of several models with damage that the search's model does not know."""
    guided, blind = [], []
    for seed in range(4):
        model = MadeUpModel(range(59), seed, noise=0.002, ruinous=(0, 1, 2, 5, 58))
        found = model.search(25).best_of_size(24)
        starts = [m for m in found.history if m.origin == "start"]
        start = min(starts, key=lambda m: m.perplexity)
        left = found.measured - len(starts)
        guided.append(math.log(start.perplexity / found.perplexity))
        blind.append(math.log(start.perplexity / random_exchanges(model, start.points, left)))
    assert statistics.mean(blind) < 0.5 * statistics.mean(guided)


@pytest.mark.parametrize("count", [10, 30, 48])
def test_ruinous_points_are_avoided(count):
    ruinous = {0, 1, 2, 5, 58}
    model = MadeUpModel(range(59), seed=1, noise=0.001, ruinous=tuple(ruinous))
    assert not ruinous & set(model.search(20).best_of_size(count).points)


@pytest.mark.parametrize("budget", [1, 3, 17])
def test_the_budget_is_kept_exactly(budget):
    model = MadeUpModel(range(59), seed=2, noise=0.002)
    found = model.search(budget).best_of_size(25)
    assert found.measured == len(model.asked) == len(set(model.asked)) == budget


def test_the_budget_is_not_spent_for_nothing():
    """With every point alike and no interaction nothing can be gained, and the search sees that."""
    asked = []

    def measure(points):
        asked.append(points)
        return PLAIN * 1.01 ** len(points)

    Search(dict.fromkeys(range(6), 0.01 * PLAIN), measure, PLAIN, 1000).best_of_size(3)
    assert len(asked) < 20


def test_no_points_and_all_points():
    model = MadeUpModel(range(59), seed=3)
    none = model.search(10).best_of_size(0)
    assert (none.points, none.perplexity, none.measured) == ((), PLAIN, 0)
    every = model.search(10).best_of_size(59)
    assert every.points == tuple(range(59))
    assert every.measured == len(model.asked) == 1


def test_attention_points_only():
    model = MadeUpModel(range(0, 24, 2), seed=4)
    best = min(itertools.combinations(model.points, 6), key=model.perplexity)
    assert model.search(40).best_of_size(6).points == best


def test_perplexities_without_end():
    """Sets whose perplexity overflows, or is no number, are never chosen and do no harm."""
    model = MadeUpModel(range(20), seed=5, noise=0.002)

    def measure(points):
        if 3 in points and 4 in points:
            return math.inf if 5 in points else math.nan
        return model(points)

    found = Search(model.scores(), measure, PLAIN, 30).best_of_size(12)
    assert math.isfinite(found.perplexity)
    assert not {3, 4} <= set(found.points)


def test_of_equal_exchanges_the_latest_is_measured_first():
    """Points 16 and 18 have the best scores, and together cost more than these say; all others are alike."""
    asked = []
    cost = dict.fromkeys(range(0, 16, 2), 0.01) | {16: 0.001, 18: 0.001}

    def measure(points):
        asked.append(points)
        return PLAIN * math.exp(sum(cost[p] for p in points) + 0.02 * ({16, 18} <= set(points)))

    Search({p: PLAIN * math.expm1(y) for p, y in cost.items()}, measure, PLAIN, 2).best_of_size(2)
    assert asked[0] == (16, 18)
    assert asked[1] in [(14, 16), (14, 18)]


def test_a_model_that_every_set_ruins():
    """Infinite perplexity everywhere: the budget is spent, the answer is a set all the same."""
    scores = MadeUpModel(range(10), seed=0).scores()
    found = Search(scores, lambda points: math.inf, PLAIN, 8).best_of_size(4)
    assert (found.perplexity, found.measured, len(found.points)) == (math.inf, 8, 4)
    assert Search(scores, lambda points: math.inf, PLAIN, 8).largest_within(50).points == ()


# ---- the largest set within a limit ------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_the_largest_set_of_a_small_model_is_found(seed):
    model = MadeUpModel(range(11), seed)
    for percent in (3.0, 10.0, 25.0):
        limit = PLAIN * (1 + percent / 100)
        sizes = [
            n for n in range(12) for c in itertools.combinations(range(11), n) if model.perplexity(c) <= limit
        ]
        found = model.search(80).largest_within(percent)
        assert len(found.points) == max(sizes)
        assert found.perplexity == model.perplexity(found.points) <= limit


@pytest.mark.parametrize("percent", [0.5, 5.0, 30.0, 500.0])
@pytest.mark.parametrize("budget", [1, 6, 20])
def test_the_limit_is_confirmed_by_measurement_within_the_budget(percent, budget):
    model = MadeUpModel(range(59), seed=6, noise=0.002, ruinous=(0, 58))
    found = model.search(budget).largest_within(percent)
    assert found.measured == len(model.asked) <= budget
    assert found.points == () or found.points in model.asked
    assert found.perplexity <= PLAIN * (1 + percent / 100)
    fitting = [m for m in found.history if m.perplexity <= PLAIN * (1 + percent / 100)]
    assert len(found.points) == max((len(m.points) for m in fitting), default=0)
    assert all(m.perplexity >= found.perplexity for m in fitting if len(m.points) == len(found.points))


def test_a_larger_limit_and_more_measurements_never_mean_fewer_points():
    model = MadeUpModel(range(41), seed=7, noise=0.002, ruinous=(0, 1, 40))
    by_limit = [len(model.search(20).largest_within(p).points) for p in (1, 4, 10, 100)]
    assert by_limit == sorted(by_limit)
    by_budget = [len(model.search(b).largest_within(10).points) for b in (1, 4, 8, 30)]
    assert by_budget == sorted(by_budget)
    assert by_budget[2] >= by_budget[-1] - 3


def test_everything_fits_and_nothing_fits():
    model = MadeUpModel(range(20), seed=8)
    assert model.search(40).largest_within(1e6).points == tuple(range(20))
    assert model.search(40).largest_within(0).points == ()


def test_limits_of_scores_that_promise_too_much():
    """Sets cost ten times what the scores say: the search finds out and still confirms a set."""
    model = MadeUpModel(range(59), seed=9)
    scores = {p: s / 10 for p, s in model.scores().items()}
    found = Search(scores, model, PLAIN, 40).largest_within(10)
    honest = model.search(40).largest_within(10)
    assert found.perplexity <= PLAIN * 1.1
    assert len(found.points) >= len(honest.points) - 4


# ---- repeatable and resumable ------------------------------------------------------------------------------


def call(search, what):
    return search.best_of_size(12) if what == "size" else search.largest_within(6)


@pytest.mark.parametrize("what", ["size", "limit"])
def test_the_same_search_twice_is_the_same(what):
    model = MadeUpModel(range(31), seed=10, noise=0.002)
    assert call(model.search(15), what) == call(model.search(15), what)
    assert model.asked[: len(model.asked) // 2] == model.asked[len(model.asked) // 2 :]


@pytest.mark.parametrize("what", ["size", "limit"])
@pytest.mark.parametrize("killed_after", [0, 1, 7, 13])
def test_a_killed_search_goes_on_without_repeating(tmp_path, what, killed_after):
    model = MadeUpModel(range(31), seed=11, noise=0.002)
    whole = call(model.search(14), what)
    expected, model.asked = model.asked, []
    assert len(expected) == 14

    def dies(points):
        if len(model.asked) == killed_after:
            raise KeyboardInterrupt
        return model(points)

    state = tmp_path / "sets.json"
    with pytest.raises(KeyboardInterrupt):
        call(Search(model.scores(), dies, PLAIN, 14, state, "a"), what)
    assert call(model.search(14, state=state, identity="a"), what) == whole
    assert model.asked == expected
    kept = json.loads(state.read_text())["sets"]
    assert [tuple(s["points"]) for s in kept] == expected


def test_a_state_file_of_another_search(tmp_path):
    state = tmp_path / "sets.json"
    model = MadeUpModel(range(8), seed=0)
    model.search(3, state=state, identity="G = 3").best_of_size(3)
    with pytest.raises(UserError, match=r"sets\.json .*another search"):
        model.search(3, state=state, identity="G = 2")


def test_several_calls_share_what_was_measured():
    model = MadeUpModel(range(30), seed=12, noise=0.002)
    search = model.search(15)
    first, second = search.best_of_size(10), search.best_of_size(11)
    assert first.measured == second.measured == 15
    assert len(set(model.asked)) == len(model.asked) == 30
    again = search.best_of_size(10)
    assert again.perplexity <= first.perplexity


def test_progress_hears_of_every_set():
    model = MadeUpModel(range(30), seed=13, noise=0.002)
    told = []
    found = model.search(15, progress=told.append).best_of_size(10)
    assert tuple(told) == found.history
    assert all(isinstance(m, MeasuredSet) and m.predicted > 0 for m in told)
    assert [m.points for m in told] == model.asked
    assert [m.perplexity for m in told] == [model.perplexity(m.points) for m in told]


# ---- bad input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [-1, 9])
def test_count_out_of_range(count):
    with pytest.raises(UserError, match=rf"{count} sync points .*0 to 8"):
        MadeUpModel(range(8), 0).search(5).best_of_size(count)


@pytest.mark.parametrize("percent", [-1.0, math.nan, math.inf])
def test_bad_percentage(percent):
    with pytest.raises(UserError, match=r"perplexity increase of .* expected a number >= 0"):
        MadeUpModel(range(8), 0).search(5).largest_within(percent)


@pytest.mark.parametrize(
    ("scores", "plain", "budget", "message"),
    [
        ({0: 1.0}, PLAIN, 0, "budget of 0"),
        ({0: 1.0}, 0.0, 5, "plain perplexity of 0"),
        ({0: 1.0}, math.nan, 5, "plain perplexity of nan"),
        ({0: 1.0, 4: math.inf}, PLAIN, 5, "sync point 4 is inf"),
        ({3: -30.0}, PLAIN, 5, "sync point 3 is -30"),
    ],
)
def test_unusable_numbers(scores, plain, budget, message):
    with pytest.raises(UserError, match=message):
        Search(scores, lambda points: PLAIN, plain, budget)
