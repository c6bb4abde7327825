"""Heads and neurons together: K against Jacobians and real changes, the search against all partitions."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_spd.grouping import joint
from megatron_spd.grouping.formulas import BlockFormulas
from megatron_spd.grouping.joint import GroupLosses, group_heads_and_neurons, total_loss
from megatron_spd.runtime.distributed import Runtime
from tests.calibration_cases import base_of, settings_of
from tests.reference import Shape, random_block

SHAPES = {
    "gqa": Shape(hidden=10, heads=6, kv_groups=3, head_dim=4, ffn=8),
    "plain": Shape(hidden=8, heads=4, kv_groups=4, head_dim=2, ffn=6, gated=False),
}
TOKENS = 6


def case(name: str) -> tuple[BlockFormulas, Tensor, Tensor]:
    """A block, the MLP's dense input [n, h], and what o_proj sees [n, heads * d]."""
    shape = SHAPES[name]
    generator = torch.Generator().manual_seed(2)
    block = BlockFormulas(random_block(shape, 1, generator, True), base_of(shape), settings_of(shape))
    u = torch.randn(TOKENS, shape.hidden, generator=generator, dtype=torch.float64)
    context = torch.randn(TOKENS, shape.heads * shape.head_dim, generator=generator, dtype=torch.float64)
    return block, u, context


def parts_of(block: BlockFormulas, context: Tensor, centred: bool) -> Tensor:
    """a_k [groups, n, h]."""
    groups = block.base.num_key_value_heads
    width = context.shape[1] // groups
    output = block.weights["self_attn.o_proj.weight"]
    columns = [slice(k * width, (k + 1) * width) for k in range(groups)]
    parts = torch.stack([context[:, c] @ output[:, c].T for c in columns])
    return parts - parts.mean(1, keepdim=True) if centred else parts


def activations(block: BlockFormulas, u: Tensor) -> Tensor:
    return block.activations(block.normed(u, "mlp")[None])


@pytest.mark.parametrize("no_grad", [True, False])
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("name", SHAPES)
def test_losses_are_products_with_the_jacobian(
    runtime: Runtime, name: str, centred: bool, no_grad: bool
) -> None:
    """Calibration runs without gradients; derivatives are wanted all the same."""
    block, u, context = case(name)
    streamed = GroupLosses(block, centred)
    with torch.set_grad_enabled(not no_grad):
        streamed.add(u, context)
    got = streamed.tensor(runtime)
    parts = parts_of(block, context, centred)
    sizes = block.weights["mlp.down_proj.weight"].square().sum(0)
    wanted = torch.zeros(got.shape, dtype=torch.float64)
    for t in range(TOKENS):
        jacobian = torch.autograd.functional.jacobian(lambda x: activations(block, x), u[t])
        changes = jacobian @ parts[:, t].T
        wanted += changes[:, :, None] * changes[:, None, :] * sizes[:, None, None] / TOKENS
    np.testing.assert_allclose(got, wanted, rtol=1e-6)


def test_losses_are_those_of_small_changes(runtime: Runtime) -> None:
    """What the neurons really lose when a little of the unseen groups' parts is taken away."""
    block, u, context = case("gqa")
    streamed = GroupLosses(block, centred=False)
    streamed.add(u, context)
    losses = streamed.tensor(runtime)
    parts, little = parts_of(block, context, False), 1e-5
    sizes = block.weights["mlp.down_proj.weight"].square().sum(0)
    for unseen in ([0], [1, 2], [0, 1, 2]):
        missing = little * parts[unseen].sum(0)
        change = (activations(block, u) - activations(block, u - missing)) / little
        wanted = change.square().mean(0) * sizes
        np.testing.assert_allclose(losses[:, unseen][:, :, unseen].sum((1, 2)), wanted, rtol=1e-3)


def test_pieces_of_tokens_add_up(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    block, u, context = case("gqa")
    whole, pieces = GroupLosses(block, False), GroupLosses(block, False)
    whole.add(u, context)
    monkeypatch.setattr(joint, "_CHUNK_ELEMENTS", 1)  # one token at a time
    for rows in torch.arange(TOKENS).split(4):
        pieces.add(u[rows], context[rows])
    np.testing.assert_allclose(pieces.tensor(runtime), whole.tensor(runtime))


# ---- the search -----------------------------------------------------------------------------------------------------


def random_losses(neurons: int, groups: int, seed: int) -> NDArray[np.float64]:
    """K of random neurons, each of which depends on some groups more than on others."""
    rng = np.random.default_rng(seed)
    changes = rng.normal(size=(neurons, groups, 4)) * rng.exponential(size=(neurons, groups, 1)) ** 2
    return np.einsum("nkt,nlt->nkl", changes, changes)


def partitions(items: list[int], size: int) -> Iterator[list[int]]:
    """Every way to part ``items`` into sets of ``size``, one set after the other."""
    if not items:
        yield []
        return
    for others in itertools.combinations(items[1:], size - 1):
        part = [items[0], *others]
        for rest in partitions([i for i in items if i not in part], size):
            yield part + rest


def exchanged(order: list[int], i: int, j: int) -> list[int]:
    other = list(order)
    other[i], other[j] = order[j], order[i]
    return other


def brute_force(losses: NDArray[np.float64], order: list[int], branches: int) -> float:
    """The least loss of ``order`` over all balanced ways to place the neurons."""
    neurons, groups = losses.shape[:2]
    cost = np.empty((neurons, branches))
    for n, g in itertools.product(range(neurons), range(branches)):
        seen = order[g * groups // branches : (g + 1) * groups // branches]
        unseen = [k for k in range(groups) if k not in seen]
        cost[n, g] = losses[n][np.ix_(unseen, unseen)].sum()
    places = partitions(list(range(neurons)), neurons // branches)
    branch = np.arange(neurons) // (neurons // branches)
    return min(
        cost[list(arranged), branch].sum()
        for parts in places
        for arranged in _branch_orders(parts, neurons // branches)
    )


def _branch_orders(parts: list[int], size: int) -> Iterator[list[int]]:
    pieces = [parts[i : i + size] for i in range(0, len(parts), size)]
    for arranged in itertools.permutations(pieces):
        yield [n for piece in arranged for n in piece]


@pytest.mark.parametrize(("groups", "branches"), [(4, 2), (6, 3)])
def test_loss_of_an_order_is_that_of_its_best_neurons(groups: int, branches: int) -> None:
    losses = random_losses(6, groups, 0)
    for order in list(itertools.permutations(range(groups)))[::97]:
        wanted = brute_force(losses, list(order), branches)
        assert total_loss(losses, order, branches) == pytest.approx(wanted)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("groups", "branches"), [(4, 2), (6, 2), (6, 3), (8, 4)])
def test_the_best_of_all_partitions_is_found(groups: int, branches: int, seed: int) -> None:
    """No exchange of two groups helps at the end, which is not a proof; on these draws it is the best all the same."""
    losses = random_losses(24, groups, seed)
    order = group_heads_and_neurons(losses, branches)
    assert sorted(order) == list(range(groups))
    size = groups // branches
    assert all(order[i : i + size] == sorted(order[i : i + size]) for i in range(0, groups, size))
    everything = partitions(list(range(groups)), size)
    best = min(total_loss(losses, candidate, branches) for candidate in everything)
    assert total_loss(losses, order, branches) <= best * (1 + 1e-9)


@pytest.mark.parametrize(("groups", "branches"), [(8, 2), (12, 3)])
def test_bounds_of_exchanges(groups: int, branches: int) -> None:
    """Every exchange is listed once, the bound is what its neurons lose where they need not be balanced."""
    losses = random_losses(24, groups, 1)
    labels = np.arange(groups) % branches
    costs = joint._neuron_costs(losses, labels, branches)
    listed = joint._exchanges(losses, labels, costs)
    pairs = {(i, j) for i, j in itertools.combinations(range(groups), 2) if labels[i] != labels[j]}
    assert {(i, j) for _, i, j in listed} == pairs
    assert listed == sorted(listed)
    for bound, i, j in listed:
        changed = labels.copy()
        changed[i], changed[j] = labels[j], labels[i]
        wanted = joint._neuron_costs(losses, changed, branches)
        assert bound == pytest.approx(wanted.min(1).sum())
        assert bound <= total_loss(losses, np.argsort(changed, kind="stable"), branches) * (1 + 1e-9)


@pytest.mark.parametrize(("groups", "branches"), [(8, 2), (12, 3)])
def test_no_exchange_helps_at_the_end(groups: int, branches: int) -> None:
    losses = random_losses(24, groups, 0)
    order = group_heads_and_neurons(losses, branches)
    found = total_loss(losses, order, branches)
    for i, j in itertools.combinations(range(groups), 2):
        assert total_loss(losses, exchanged(order, i, j), branches) >= found * (1 - 1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_no_start_is_better(seed: int) -> None:
    losses = random_losses(32, 8, seed)
    rng = np.random.default_rng(seed)
    starts = [rng.permutation(8).tolist() for _ in range(6)]
    found = total_loss(losses, group_heads_and_neurons(losses, 4, starts), 4)
    for start in [list(range(8)), *starts]:
        assert found <= total_loss(losses, start, 4) * (1 + 1e-9)


def test_the_same_losses_give_the_same_order() -> None:
    losses = random_losses(24, 8, 3)
    orders = [group_heads_and_neurons(losses.copy(), 4, [[7, 6, 5, 4, 3, 2, 1, 0]]) for _ in range(2)]
    assert orders[0] == orders[1]
    assert all(type(k) is int for k in orders[0])


def test_groups_that_the_same_neurons_need_sit_together() -> None:
    """Half of the neurons read groups 0 and 3, the others 1 and 2: nothing need be lost."""
    changes = np.zeros((8, 4, 2))
    changes[:4, [0, 3]] = 1.0
    changes[4:, [1, 2]] = 1.0
    losses = np.einsum("nkt,nlt->nkl", changes, changes)
    order = group_heads_and_neurons(losses, 2)
    assert {frozenset(order[:2]), frozenset(order[2:])} == {frozenset({0, 3}), frozenset({1, 2})}
    assert total_loss(losses, order, 2) == 0.0
    assert total_loss(losses, range(4), 2) > 0.0


@pytest.mark.parametrize("branches", [1, 4])
def test_nothing_to_choose(branches: int) -> None:
    assert group_heads_and_neurons(random_losses(8, 4, 0), branches) == [0, 1, 2, 3]
