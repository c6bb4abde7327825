"""The model of the damage: its formula, what it learns, and its optimum."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from megatron_spd.sensitivity.damage_model import DamageModel
from megatron_spd.sensitivity.neighbours import Prices

#: Median size 0.02; block 1's attention (point 2) is ruinous.
ALONE = {0: 0.02, 1: 0.01, 2: 0.9, 3: 0.03, 4: 0.02, 5: 0.02, 6: 0.015, 7: 0.025}
ALL_SETS = [c for n in range(len(ALONE) + 1) for c in itertools.combinations(ALONE, n)]


def predicted(model, sets):
    return model.predict(model.members(sets))[0]


def test_before_it_has_learnt_it_follows_the_stated_prior():
    unit, total = 0.02, 8
    for points in [(), (0,), (0, 1), (1, 2), (3, 4, 5, 6), (0, 1, 2, 5, 6, 7)]:
        chosen = set(points)
        pairs = [p for p in points if p + 1 in chosen]
        threes = sum(p + 1 in chosen and p + 2 in chosen for p in points)
        neighbours = sum(0.3 if p % 2 == 0 else 1.5 for p in pairs) + 2 * threes
        expected = (1 + 1.5 * len(points) / total) * sum(ALONE[p] for p in points) + unit * neighbours
        assert predicted(DamageModel(ALONE), [points])[0] == pytest.approx(expected)


def test_it_learns_a_rule_of_its_own_form_from_some_sets():
    rng = np.random.default_rng(0)
    own = dict(zip(ALONE, rng.normal(0, 0.01, len(ALONE)), strict=True))

    def truth(points):
        chosen = set(points)
        y = (1 + 0.9 * len(points) / 8) * sum(ALONE[p] + own[p] for p in points)
        return y + 0.02 * sum(0.1 if p % 2 == 0 else 3.0 for p in points if p + 1 in chosen)

    harmless = [s for s in ALL_SETS if 2 not in s]
    seen = [harmless[i] for i in rng.permutation(len(harmless))[:30]]
    model = DamageModel(ALONE)
    unseen = [s for s in harmless if s not in seen]
    target = np.array([truth(s) for s in unseen])
    before = predicted(model, unseen)
    model.fit(seen, [truth(s) for s in seen])
    error = np.abs(predicted(model, unseen) - target)
    assert np.median(error) < 0.2 * np.median(np.abs(before - target))
    assert np.median(error) < 0.005


def test_what_was_measured_is_less_uncertain():
    model = DamageModel(ALONE)
    sets = [(0, 1), (4, 5, 6)]
    before = model.predict(model.members(sets))[1]
    model.fit(sets[:1], [0.05])
    after = model.predict(model.members(sets))[1]
    assert after[0] < 0.3 * before[0]
    assert 0.3 * before[1] < after[1] < before[1]


def test_infinite_damage_teaches_nothing():
    one, two = DamageModel(ALONE), DamageModel(ALONE)
    one.fit([(0, 1)], [0.1])
    two.fit([(0, 1), (2, 3)], [0.1, math.inf])
    assert predicted(one, ALL_SETS) == pytest.approx(predicted(two, ALL_SETS), rel=1e-12)


@pytest.mark.parametrize("learnt", [False, True])
def test_best_set_is_the_least_predicted_of_all(learnt):
    model = DamageModel(ALONE)
    if learnt:
        model.fit([(0, 1, 4), (5, 6, 7), (0, 3, 6)], [0.02, 0.3, 0.04])
    for count in range(len(ALONE) + 1):
        sets = [s for s in ALL_SETS if len(s) == count]
        best = predicted(model, [model.best_set(count)])[0]
        assert best == pytest.approx(predicted(model, sets).min())


def test_best_set_by_prices_ignores_what_was_learnt():
    model = DamageModel(ALONE)
    model.fit([(1, 6)], [5.0])
    assert model.best_set(2, Prices(0, 0)) == (1, 6)


@pytest.mark.parametrize("points", [[0, 2, 4], [1, 3], [5], []])
def test_points_without_neighbours(points):
    """Attention points only, a single one, none: no pairs, no runs."""
    model = DamageModel(dict.fromkeys(points, 0.1))
    model.fit([tuple(points)], [0.2 * len(points)])
    assert model.best_set(len(points)) == tuple(points)
    assert predicted(model, [()])[0] == 0.0
