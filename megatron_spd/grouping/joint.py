"""Heads and neurons together: which key/value groups sit together, given that the neurons will follow.

The published criterion (``heads.py``) spreads heads with different attention maps and never looks at the MLP that has
to do without them. Here the error itself decides. To first order, neuron n of a branch that does not see the groups k
of a set N errs by the sum over k in N of its change per group, so that the block's output error is a sum over neurons
of

    loss_n(N) = sum over k, k' in N of K[n, k, k']
    K[n, k, k'] = mean over tokens of (J_n a_k) (J_n a_k') * |down_n|^2

with a_k the part of the attention output that group k makes (less its mean where the shift stands in for it) and J_n
the derivative of act_n(norm(U)) along it. K [ffn, groups, groups] is all that is kept of the tokens. Given the groups
of each branch, the best neurons are a balanced assignment (``assignment.py``). Two groups are exchanged while that
lowers the loss *with the neurons assigned anew*: judged with the neurons where they are, hardly any exchange looks
good, because they have been put where the groups are. The best of several starts is taken. Whether it also beats the
published choice on the real, held-out block error is for ``calibrate.py`` to measure.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_spd.comm.all_reduce import all_reduce
from megatron_spd.grouping.assignment import assign_neurons
from megatron_spd.grouping.formulas import BlockFormulas
from megatron_spd.grouping.heads import partition_heads
from megatron_spd.runtime.distributed import Runtime

#: Exchanges for which neurons are assigned before a set of groups counts as final; the first is mostly the one.
_TRIALS = 16
#: Gains below this share of the loss are rounding.
_ROUNDING = 1e-9
#: Neurons whose derivatives are held at a time, times tokens and groups, in elements.
_CHUNK_ELEMENTS = 2**24

Losses = NDArray[np.float64]


class GroupLosses:
    """K [ffn, groups, groups], streamed."""

    def __init__(self, dense: BlockFormulas, centred: bool) -> None:
        """``centred``: means of the groups' parts do not count, because a shift will stand in for them."""
        down = dense.weights["mlp.down_proj.weight"]
        self._dense, self._centred = dense, centred
        self._groups = dense.base.num_key_value_heads
        self._sizes = down.float().square().sum(0)
        shape = (down.shape[1], self._groups, self._groups)
        self._sum = torch.zeros(shape, dtype=torch.float64, device=down.device)
        self._count = torch.zeros(1, dtype=torch.float64, device=down.device)

    def add(self, u: Tensor, context: Tensor) -> None:
        """Rows of tokens: the MLP's dense input ``u`` [n, h] and what o_proj sees, ``context`` [n, heads * d]."""
        output = self._dense.weights["self_attn.o_proj.weight"]
        pairs = zip(context.chunk(self._groups, -1), output.chunk(self._groups, 1), strict=True)
        parts = torch.stack([c @ w.T for c, w in pairs])
        if self._centred:
            parts = parts - parts.mean(1, keepdim=True)
        step = max(1, _CHUNK_ELEMENTS // (self._groups * self._sum.shape[0]))
        for start in range(0, len(u), step):
            changes = self._derivatives(u[start : start + step], parts[:, start : start + step])
            self._sum += torch.einsum("ktn,ltn->nkl", changes, changes)
        self._count += len(u)

    def _derivatives(self, u: Tensor, parts: Tensor) -> Tensor:
        """J_n a_k [groups, n tokens, ffn] by forward differentiation."""

        def activations(x: Tensor) -> Tensor:
            return self._dense.activations(self._dense.normed(x, "mlp")[None])

        return torch.stack([torch.func.jvp(activations, (u,), (part,))[1] for part in parts])

    def tensor(self, runtime: Runtime) -> Losses:
        """K over the tokens of all ranks. A collective."""
        total, count = (
            all_reduce(self._sum, runtime.world_group),
            all_reduce(self._count, runtime.world_group),
        )
        mean = total / count.clamp_min(1.0)
        return (mean * self._sizes[:, None, None]).cpu().numpy()


def group_heads_and_neurons(losses: Losses, branches: int, starts: Sequence[Sequence[int]] = ()) -> list[int]:
    """``kv_group_order`` that, with the neurons that suit it best, loses least to first order.

    Args:
        losses: K [ffn, groups, groups].
        starts: orders to begin from beside the original one and the one that parts the most alike groups.

    Returns:
        The groups of branch 0, 1, ..., each ascending.
    """
    groups = losses.shape[1]
    if branches in (1, groups):
        # One branch, or one group each: neurons find their group wherever it stands.
        return list(range(groups))
    total = losses.sum(0)
    alike = partition_heads(total.max() - (total + total.T) / 2, branches)
    candidates = [list(range(groups)), list(itertools.chain(*alike)), *map(list, starts)]
    found = [_improved(losses, _labels(order, branches), branches) for order in candidates]
    _, labels = min(found, key=lambda result: result[0])
    return [int(k) for k in np.argsort(labels, kind="stable")]


def total_loss(losses: Losses, order: Sequence[int], branches: int) -> float:
    """What ``order`` loses to first order with the neurons that suit it best."""
    return assign_neurons(_neuron_costs(losses, _labels(order, branches), branches)).cost


def _labels(order: Sequence[int], branches: int) -> NDArray[np.int64]:
    labels = np.empty(len(order), dtype=np.int64)
    labels[np.asarray(order)] = np.arange(len(order)) // (len(order) // branches)
    return labels


def _improved(losses: Losses, labels: NDArray[np.int64], branches: int) -> tuple[float, NDArray[np.int64]]:
    """The loss and the branch of each group after exchanges of two groups that lower it, until none is found."""
    costs = _neuron_costs(losses, labels, branches)
    best = assign_neurons(costs).cost
    while True:
        for bound, i, j in _exchanges(losses, labels, costs)[:_TRIALS]:
            if bound >= best * (1 - _ROUNDING):
                return best, labels
            changed = labels.copy()
            changed[i], changed[j] = labels[j], labels[i]
            changed_costs = _neuron_costs(losses, changed, branches)
            loss = assign_neurons(changed_costs).cost
            if loss < best * (1 - _ROUNDING):
                best, labels, costs = loss, changed, changed_costs
                break
        else:
            return best, labels


def _exchanges(losses: Losses, labels: NDArray[np.int64], costs: Losses) -> list[tuple[float, int, int]]:
    """All exchanges of two groups of different branches, with a lower bound of the loss behind each, the lowest first.

    The bound is the loss where neurons need not be balanced: each goes where it loses least.
    """
    unseen = np.stack([labels != g for g in range(costs.shape[1])]).astype(np.float64)
    along = np.einsum("nkl,gl->gkn", losses, unseen, optimize=True)
    bounds = []
    for i, j in itertools.combinations(range(len(labels)), 2):
        g, h = labels[i], labels[j]
        if g != h:
            # loss_n is quadratic in what is unseen: i instead of j in g, j instead of i in h.
            square = losses[:, i, i] + losses[:, j, j] - 2 * losses[:, i, j]
            changed = costs.copy()
            changed[:, g] += square + 2 * (along[g, i] - along[g, j])
            changed[:, h] += square + 2 * (along[h, j] - along[h, i])
            bounds.append((float(changed.min(1).sum()), i, j))
    return sorted(bounds)


def _neuron_costs(losses: Losses, labels: NDArray[np.int64], branches: int) -> Losses:
    """loss_n of what branch g does not see, [ffn, G]."""
    unseen = np.stack([labels != g for g in range(branches)]).astype(np.float64)
    return np.einsum("gk,nkl,gl->ng", unseen, losses, unseen, optimize=True)
