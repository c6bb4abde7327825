"""Balanced assignment against all assignments, against scipy, and against the condition of optimality at full size."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from megatron_spd.errors import UserError
from megatron_spd.grouping.assignment import Assignment, assign_experts, assign_neurons


@functools.cache
def all_assignments(n, branches):
    """Every balanced assignment, [count, n]."""
    size = n // branches

    def fill(free, g):
        if g == branches - 1:
            yield dict.fromkeys(free, g)
            return
        for part in itertools.combinations(free, size):
            for rest in fill(tuple(i for i in free if i not in part), g + 1):
                yield {**dict.fromkeys(part, g), **rest}

    return np.array([[a[i] for i in range(n)] for a in fill(tuple(range(n)), 0)])


def totals(cost):
    """Total cost of every balanced assignment."""
    n, branches = cost.shape
    return cost[np.arange(n), all_assignments(n, branches)].sum(1)


def scipy_cost(cost):
    """The least total cost, by G x (n / G) columns of a square assignment problem."""
    n, branches = cost.shape
    size = n // branches
    rows, columns = linear_sum_assignment(np.repeat(cost, size, axis=1))
    return cost[rows, columns // size].sum()


def home(n, branches):
    return np.arange(n) // (n // branches)


def check(cost, found):
    """What holds for every answer: balance, the stated cost, a bound below it."""
    n, branches = cost.shape
    assert found.branch.shape == (n,)
    assert found.branch.dtype == np.int64
    assert np.bincount(found.branch, minlength=branches).tolist() == [n // branches] * branches
    assert found.cost == pytest.approx(cost[np.arange(n), found.branch].sum(), rel=1e-12, abs=1e-12)
    assert found.lower_bound <= found.cost


# The last shapes have eight neurons or more per branch: first prices come from a smaller problem.
SHAPES = [(2, 1), (3, 3), (4, 2), (5, 5), (6, 2), (6, 3), (8, 4), (9, 3), (10, 2), (16, 2), (18, 2)]
#: Relative to the largest cost: what rounding may do to sums of at most 18 numbers and to prices.
ROUNDING = 1e-12


def costs_of(elements):
    """Matrices [n, G] of one of SHAPES."""
    return st.sampled_from(SHAPES).flatmap(
        lambda shape: st.lists(elements, min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]).map(
            lambda values: np.array(values, dtype=np.float64).reshape(shape)
        )
    )


ELEMENTS = {
    "ties": st.integers(-2, 2),
    "integers": st.integers(-1000, 1000),
    "unit": st.floats(0, 1),
    "signed": st.floats(-1e6, 1e6),
    "wide": st.floats(-12, 12).map(lambda x: 10.0**x),
    "forbidden": st.one_of(st.floats(0, 1), st.just(1e15)),
}


# ---- the best of all ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ELEMENTS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_no_assignment_is_cheaper_and_the_bound_says_so(kind, data):
    cost = data.draw(costs_of(ELEMENTS[kind]))
    found = assign_neurons(cost)
    check(cost, found)
    best = totals(cost).min()
    allowed = ROUNDING * max(abs(best), np.abs(cost).max() if kind == "signed" else 0.0)
    assert found.cost <= best + allowed
    assert found.lower_bound == pytest.approx(best, rel=0, abs=allowed)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(cost=costs_of(ELEMENTS["ties"]), unit=st.sampled_from([1.0, 0.1]))
def test_of_the_best_it_leaves_most_neurons_at_home(cost, unit):
    """With unit 0.1 sums that should tie differ by rounding."""
    n, branches = cost.shape
    everything, total = all_assignments(n, branches), totals(cost)
    stay = (everything == home(n, branches)).sum(1)
    found = assign_neurons(cost * unit)
    assert (found.branch == home(n, branches)).sum() == stay[total == total.min()].max()
    assert found.cost == pytest.approx(total.min() * unit, abs=ROUNDING)


def shaped(kind, n, branches):
    """Costs like those of real blocks, and those that are hard on prices."""
    rng = np.random.default_rng(n + branches)
    noise = rng.random((n, branches))
    scale = np.exp(2 * rng.standard_normal((n, 1)))
    match kind:
        case "scaled":  # few neurons cost most
            return scale * noise
        case "product":  # the neuron's gain times the branch's error: every price hangs on its neighbours
            return scale * np.linspace(1, 3, branches)
        case "product_with_noise":
            return scale * rng.random(branches) * np.exp(0.2 * rng.standard_normal((n, branches)))
        case "ties":
            return np.floor(4 * noise)
        case "dead":  # half of the neurons never fire
            return np.where(np.arange(n)[:, None] % 2, noise, 0.0)
        case "crowded":  # all want to the same branch
            return noise + 100.0 * (np.arange(branches) > 0)
        case _:  # some pairs are as good as forbidden
            return np.where(rng.random((n, branches)) < 0.3, 1e9, noise)


KINDS = ["scaled", "product", "product_with_noise", "ties", "dead", "crowded", "forbidden"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "branches"), [(300, 2), (300, 3), (640, 5), (1000, 8), (512, 64)])
def test_as_cheap_as_scipy(n, branches, kind):
    cost = shaped(kind, n, branches)
    found = assign_neurons(cost)
    check(cost, found)
    assert found.cost == pytest.approx(scipy_cost(cost), rel=1e-12)
    assert found.gap < 1e-12


def test_as_cheap_as_scipy_at_the_size_of_smollm2():
    cost = shaped("product_with_noise", 1536, 3)
    assert assign_neurons(cost).cost == pytest.approx(scipy_cost(cost), rel=1e-12)


@pytest.mark.parametrize("kind", ["product", "product_with_noise", "ties"])
@pytest.mark.parametrize("branches", [8, 64])
def test_exact_at_the_size_of_llama2_70b(branches, kind):
    """Best if and only if no round of exchanges between branches gains: shortest ways from a branch back to itself."""
    n = 28672
    cost = shaped(kind, n, branches)
    found = assign_neurons(cost)
    check(cost, found)
    assert found.gap < 1e-9

    own = cost[np.arange(n), found.branch]
    way = np.stack([(cost - own[:, None])[found.branch == a].min(0) for a in range(branches)])
    for through in range(branches):
        way = np.minimum(way, way[:, [through]] + way[through])
    assert way.diagonal().min() > -1e-12 * np.abs(cost).max()


# ---- what follows ---------------------------------------------------------------------------------------------------


def test_the_same_costs_give_the_same_assignment():
    cost = shaped("ties", 960, 6)
    before = cost.copy()
    first = assign_neurons(cost)
    np.testing.assert_array_equal(cost, before)
    for again in (cost, np.asfortranarray(cost), cost.astype(np.float32)):
        np.testing.assert_array_equal(assign_neurons(again).branch, first.branch)


def test_what_all_places_share_does_not_matter():
    """Balance makes a constant per branch as meaningless as one per neuron."""
    rng = np.random.default_rng(0)
    cost = rng.integers(0, 50, (240, 4)).astype(float)
    moved = cost + rng.integers(-20, 20, (240, 1)) + rng.integers(-90, 90, (1, 4))
    plain, other = assign_neurons(cost), assign_neurons(moved)
    assert cost[np.arange(240), other.branch].sum() == plain.cost
    assert (other.branch == home(240, 4)).sum() == (plain.branch == home(240, 4)).sum()


@pytest.mark.parametrize("value", [0.0, -1.5, 0.1, 1e-30])
@pytest.mark.parametrize(("n", "branches"), [(12, 3), (1000, 8), (12, 1), (7, 7)])
def test_equal_costs_change_nothing(n, branches, value):
    found = assign_neurons(np.full((n, branches), value))
    assert found.order() == list(range(n))
    assert found.gap == 0.0


def test_one_branch_takes_all():
    cost = np.random.default_rng(0).random((50, 1))
    found = assign_neurons(cost)
    assert found.order() == list(range(50))
    assert found.cost == found.lower_bound == pytest.approx(cost.sum())


@pytest.mark.parametrize("n", [2, 7, 120])
def test_one_neuron_per_branch(n):
    cost = np.random.default_rng(n).random((n, n))
    found = assign_neurons(cost)
    check(cost, found)
    assert found.cost == pytest.approx(scipy_cost(cost), rel=1e-12)


def test_order_goes_branch_after_branch_each_ascending():
    found = Assignment(np.array([1, 0, 2, 1, 0, 2]), cost=11.0, lower_bound=10.0)
    assert found.order() == [1, 4, 0, 3, 2, 5]
    assert all(type(i) is int for i in found.order())
    assert found.gap == pytest.approx(0.1)


def test_every_expert_has_its_own():
    costs = [shaped("scaled", 96, 4), shaped("ties", 48, 2)]
    found = assign_experts(costs)
    assert [a.order() for a in found] == [assign_neurons(c).order() for c in costs]
    assert assign_experts([]) == []


@pytest.mark.parametrize("shape", [(6,), (2, 3, 4), (7, 2), (2, 4), (0, 2), (4, 0)])
def test_bad_shapes(shape):
    with pytest.raises(ValueError, match=r"expected \[n, G\] with n a multiple of G"):
        assign_neurons(np.zeros(shape))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e308])
def test_costs_that_are_not_numbers(value):
    cost = np.full((6, 2), 1.0)
    cost[3:] = value
    with pytest.raises(UserError, match="costs of 6 neurons hold NaN or overflow") as caught:
        assign_neurons(cost)
    assert "\n" not in str(caught.value)
