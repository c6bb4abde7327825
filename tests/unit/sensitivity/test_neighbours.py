"""The dynamic programme against brute force."""

from __future__ import annotations

import itertools
import random

import pytest

from megatron_spd.sensitivity.neighbours import Prices, least_damage, typical


def damage(scores, prices, pairs, points):
    """The documented damage, written out."""
    chosen = set(points)
    total = sum(scores[p] for p in points)
    for p in points:
        if p + 1 in chosen:
            total += prices.within if p % 2 == 0 else prices.across
            total += pairs.get(p, 0.0)
        if p + 1 in chosen and p + 2 in chosen:
            total += prices.run
    return total


@pytest.mark.parametrize("seed", range(12))
def test_the_choice_is_the_best_of_all(seed):
    rng = random.Random(seed)
    points = sorted(rng.sample(range(13), rng.randint(3, 11)))
    scores = {p: rng.choice([rng.uniform(-0.5, 1), rng.uniform(0, 10)]) for p in points}
    prices = Prices(*(rng.choice([0.0, rng.uniform(-0.5, 4)]) for _ in range(3)))
    pairs = {p: rng.uniform(-1, 2) for p in points if rng.random() < 0.4}
    choices = least_damage(scores, prices, pairs)
    assert [len(chosen) for _, chosen in choices] == list(range(len(points) + 1))
    for count, (found, chosen) in enumerate(choices):
        assert list(chosen) == sorted(set(chosen) & set(points))
        assert found == pytest.approx(damage(scores, prices, pairs, chosen))
        best = min(damage(scores, prices, pairs, c) for c in itertools.combinations(points, count))
        assert found == pytest.approx(best)


def test_each_price_acts_on_its_own_kind():
    scores = dict.fromkeys(range(4), 1.0)
    assert least_damage(scores, Prices(within=5, across=0))[2][1] == (0, 2)
    assert least_damage(scores, Prices(within=-1, across=5))[2] == (1.0, (0, 1))
    assert least_damage(scores, Prices(within=5, across=-1))[2] == (1.0, (1, 2))
    assert least_damage(scores, Prices(-1, -1, run=9))[3] == (2.0, (0, 1, 3))


def test_first_in_order_among_equals():
    assert least_damage(dict.fromkeys(range(5), 1.0), Prices(0, 0))[3] == (3.0, (0, 1, 2))


def test_no_points():
    assert least_damage({}, Prices(1, 1)) == [(0.0, ())]


def test_typical_leaves_zeros_out():
    assert typical([0.0, -3.0, 1.0, 2.0, 0.0]) == 2.0
    assert typical([0.0]) == 1.0


def test_prices_in_another_unit():
    assert Prices(1, 2, 3).times(0.5) == Prices(0.5, 1, 1.5)
