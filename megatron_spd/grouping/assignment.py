"""Which branch each MLP neuron goes to: the cheapest assignment that gives every branch equally many.

Neuron grouping gives every pair of neuron and branch a cost (method section 7); this module finds the best balanced
assignment, exactly, and proves it. It is a transportation problem whose linear programme has integer optima, so that
prices pi_g on the branches exist for which the best assignment puts every neuron where cost + price is least. For any
prices at all,

    sum_i min_g (cost[i, g] + pi_g)  -  n / G * sum_g pi_g

is a lower bound of every balanced assignment; at the best prices it equals the best cost. That bound is returned.

Method: prices solved on a quarter of the neurons (and so on, down to few) are good first prices. One pass over the
branches improves them, every neuron goes where cost + price is least, and what is then too many or too few (up to a
few hundred of 28672 neurons, more where costs tie) moves along shortest paths between branches, each of which keeps
the assignment optimal for the number of neurons that the branches hold.

Why not a library: ``scipy.optimize.linear_sum_assignment`` wants an n x n matrix, every column of costs n / G times.
It takes 0.2 s at 1536 x 3 and 4 s at 4096 x 8 (here: 0.01 s each), would need 6.6 GB at 28672, and returns no prices,
hence no proof. ``scipy.optimize.linprog`` (HiGHS, simplex or interior point, one equality per neuron and per branch)
takes a minute at 4096 x 8. Here 28672 x 8 takes 0.1 to 0.5 s and 28672 x 64 0.5 to 6 s, by the kind of costs. All on
one core; ``pytest tests/unit/grouping/test_assignment.py --durations=0`` shows the times at 28672 (and scipy's at
1536). The tests compare with brute force and scipy.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import dijkstra

from megatron_spd.errors import UserError

Costs = NDArray[np.float64]
Branches = NDArray[np.int64]

#: The smaller problem that gives first prices has one neuron in this many; under this many per branch there is none.
_COARSER = 4
_FEWEST_PER_BRANCH = 8
#: Differences below this, relative to what is subtracted, are rounding: two places cost the same.
_ROUNDING = 64 * np.finfo(np.float64).eps


@dataclass(frozen=True)
class Assignment:
    """Where the neurons of one MLP go.

    Attributes:
        branch: [n] the branch of every neuron; each branch occurs n / G times.
        cost: sum of the costs of these places, in the unit of the costs.
        lower_bound: no balanced assignment costs less (Lagrangian dual; to rounding).
    """

    branch: Branches
    cost: float
    lower_bound: float

    @property
    def gap(self) -> float:
        """How far from the best this can be at most, relative to ``lower_bound``; zero to rounding."""
        return (self.cost - self.lower_bound) / max(abs(self.lower_bound), float(np.finfo(np.float64).tiny))

    def order(self) -> list[int]:
        """``neuron_order`` of the plan [n]: branch after branch, inside each by original index."""
        return [int(i) for i in np.argsort(self.branch, kind="stable")]


def assign_neurons(cost: Costs) -> Assignment:
    """The balanced assignment of least total cost.

    Of several best ones, one that leaves the most neurons in their original branch i // (n / G), so that equal costs
    change nothing. The same costs give the same assignment. Work grows a little faster than n and as G^2 to G^3; G is
    meant to be small beside n.

    Args:
        cost: [n, G], cost of neuron i in branch g, of any sign.

    Raises:
        UserError: costs are NaN or so large that they overflow.
        ValueError: ``cost`` is not [n, G] with G dividing n.
    """
    cost = np.ascontiguousarray(cost, dtype=np.float64)
    if cost.ndim != 2 or 0 in cost.shape or cost.shape[0] % cost.shape[1]:
        raise ValueError(f"cost has shape {list(cost.shape)}; expected [n, G] with n a multiple of G")
    with np.errstate(over="ignore"):
        total = np.abs(cost).sum()
    if not np.isfinite(total):
        raise UserError(
            f"the costs of {cost.shape[0]} neurons hold NaN or overflow; expected finite numbers;"
            " check the checkpoint and the calibration text"
        )
    branch, prices = _solve(cost)
    slack = _slack(cost, prices)
    branch = _prefer_home(cost, prices, slack, branch)
    neurons = np.arange(len(cost))
    spent = float(cost[neurons, branch].sum())
    # In a balanced assignment the prices cancel: cost - bound is the sum of the neurons' slacks. Summed this way, all
    # terms are >= 0 and nothing is lost by cancellation.
    return Assignment(branch, spent, spent - float(slack[neurons, branch].sum()))


def assign_experts(costs: Sequence[Costs]) -> list[Assignment]:
    """One assignment per expert of a mixture, from the experts' costs [n, G]. Raises as :func:`assign_neurons`."""
    return [assign_neurons(cost) for cost in costs]


def _solve(cost: Costs) -> tuple[Branches, Costs]:
    """A best balanced assignment [n] and prices [G] that prove it, for ``cost`` [n, G]."""
    n, branches = cost.shape
    size = n // branches
    prices = np.zeros(branches)
    if size >= _FEWEST_PER_BRANCH:
        fewer = size // _COARSER * branches
        prices = _solve(cost[np.arange(fewer) * n // fewer])[1]
    if branches > 1:
        _improve_prices(cost, prices)
    total = cost + prices
    neurons = np.arange(n)
    home = neurons // size
    branch = np.where(total[neurons, home] == total.min(1), home, total.argmin(1))
    _BranchGraph(cost, prices, branch).balance()
    return branch, prices


def _improve_prices(cost: Costs, prices: Costs) -> None:
    """One pass of coordinate ascent on the lower bound, in place: each branch in turn takes the price that fills it.

    At price pi, branch g attracts the neurons i with cost[i, g] + pi below the least cost + price elsewhere. A price
    moves no further than it must: large ones would cost digits.
    """
    n, branches = cost.shape
    size = n // branches
    by_branch = np.ascontiguousarray(cost.T)
    total = by_branch + prices[:, None]
    for g in range(branches):
        total[g] = np.inf
        # The highest price at which each neuron would come; `size` of them come at prices between the two ranks.
        highest = np.partition(total.min(0) - by_branch[g], [n - size - 1, n - size])
        prices[g] = np.clip(prices[g], highest[n - size - 1], highest[n - size])
        total[g] = by_branch[g] + prices[g]


class _BranchGraph:
    """Branches as nodes; edge a -> b weighs what moving the cheapest neuron of a to b adds to the cost.

    Everything holds on to one condition: every neuron is in a branch where its cost + price is least. Then no way of
    exchanging neurons at equal counts gains anything.
    """

    def __init__(self, cost: Costs, prices: Costs, branch: Branches) -> None:
        """``prices`` [G] and ``branch`` [n] meet the condition; :meth:`balance` changes both in place."""
        n, branches = cost.shape
        self.cost, self.prices, self.branch = cost, prices, branch
        self.size = n // branches
        self.count = np.bincount(branch, minlength=branches)
        self.weight = np.empty((branches, branches))
        for a in range(branches):
            self._weigh(a)
        # Complete, with explicit entries: scipy would read the zeros of a dense matrix as missing edges.
        columns, rows = np.tile(np.arange(branches), branches), np.arange(branches + 1) * branches
        self.reduced = csr_array((np.zeros(branches**2), columns, rows), shape=(branches, branches))

    def balance(self) -> None:
        """Move neurons from the branches with too many to those with too few until all hold n / G.

        Each step takes the shortest path from any branch with too many to any with too few, and lowers the prices
        by the distance: the condition still holds, and on the path with equality for those that move.
        """
        while (self.count > self.size).any():
            # Not negative by the condition; the maximum removes rounding, which could send Dijkstra's paths in circles.
            reduced = self.weight + self.prices - self.prices[:, None]
            self.reduced.data[:] = np.maximum(reduced, 0.0).ravel()
            surplus = np.flatnonzero(self.count > self.size)
            distance, before, _ = dijkstra(
                self.reduced, indices=surplus, min_only=True, return_predecessors=True
            )
            end = int(np.argmin(np.where(self.count < self.size, distance, np.inf)))
            self.prices -= np.minimum(distance, distance[end])
            path = [end]
            while before[path[-1]] >= 0:
                path.append(int(before[path[-1]]))
            self._move(path[::-1])

    def _move(self, path: list[int]) -> None:
        """Move neurons along each edge of the path: as many as the ends allow and as cost exactly the same."""
        start, end = path[0], path[-1]
        edges = list(itertools.pairwise(path))
        movers = [self._cheapest(a, b) for a, b in edges]
        amount = min(self.count[start] - self.size, self.size - self.count[end], *map(len, movers))
        for (_, b), neurons in zip(edges, movers, strict=True):
            self.branch[neurons[:amount]] = b
        self.count[start] -= amount
        self.count[end] += amount
        for a in path:
            self._weigh(a)

    def _cheapest(self, a: int, b: int) -> NDArray[np.int64]:
        members = np.flatnonzero(self.branch == a)
        return members[self.cost[members, b] - self.cost[members, a] == self.weight[a, b]]

    def _weigh(self, a: int) -> None:
        rows = self.cost[self.branch == a]
        self.weight[a] = (rows - rows[:, [a]]).min(0, initial=np.inf)


def _slack(cost: Costs, prices: Costs) -> Costs:
    """How much more than its best place each place costs each neuron, prices included: [n, G], >= 0."""
    total = cost + prices
    return total - total.min(1, keepdims=True)


def _prefer_home(cost: Costs, prices: Costs, slack: Costs, branch: Branches) -> Branches:
    """Of all best assignments one that leaves the most neurons in their original branch.

    The best assignments are those that use only places without slack. Among them the question is a smaller problem of
    the same kind: 0 for home, 1 for another such place, and more than all of these together for the rest.
    """
    n, branches = cost.shape
    neurons = np.arange(n)
    home = neurons // (n // branches)
    free = slack <= _ROUNDING * (np.abs(cost) + np.abs(prices))
    free[neurons, branch] = True  # whatever rounding says, so that free places always suffice
    if not (free[neurons, home] & (branch != home)).any():
        return branch
    dislike = np.where(free, 1.0, n + 1.0)
    dislike[neurons[free[neurons, home]], home[free[neurons, home]]] = 0.0
    return _solve(dislike)[0]
