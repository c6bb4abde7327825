"""Head grouping as published (method section 4): which heads share a branch, and which branch they become.

1. What a head does is described by its attention scores sigma(QK) on calibration data.
2. Heads are spread so that those of one branch differ: the partition into equal parts with the largest sum of Euclidean
   distances inside the parts.
3. Each part goes to the MLP shard that it drives hardest: the matching with the largest sum of norms of
   F_shard(norm(X + b_o + A_part)).

With grouped queries, key/value groups move whole: the distance of two groups is the sum of the distances of
their heads, so that the objective is the published one under that constraint. The result is a
``kv_group_order`` of the plan. Weights go by Hugging Face Llama names relative to the block.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from megatron_spd.errors import UserError
from megatron_spd.grouping.formulas import AttentionSettings, BlockFormulas
from megatron_spd.plan import BaseModel

#: Partitions of up to this many items are exact; of more, found by :func:`_local_search`.
EXACT_LIMIT = 16
_SEARCH_STARTS = 16

Distances = NDArray[np.float64]

_NOT_FINITE = (
    "head grouping met activations that overflow or hold NaN on this text: not finite; check the checkpoint"
)


@torch.no_grad()
def group_heads(
    weights: Mapping[str, Tensor], x: Tensor, base: BaseModel, branches: int, settings: AttentionSettings
) -> list[int]:
    """The order of key/value groups that head grouping gives one block.

    Args:
        weights: the block's full tensors in the base model's order.
        x: block inputs [s, b, h] of the dense model on calibration sequences; worked through one sequence at a time.
        branches: G.

    Returns:
        ``kv_group_order`` [num_key_value_heads] for the plan: the G parts one after the other, each in ascending order.
        First-position tokens count in no norm: they carry massive activations (method section 7).

    Raises:
        UserError: G does not divide the model, or activations overflow or hold NaN.
        ValueError: ``x`` is not [s > 1, b, h].
    """
    base.check_branches(branches)
    if x.dim() != 3 or x.shape[0] < 2 or x.shape[2] != base.hidden_size:
        raise ValueError(f"x has shape {list(x.shape)}; expected [s > 1, b, {base.hidden_size}]")
    if branches == 1:
        return list(range(base.num_key_value_heads))
    block = BlockFormulas(weights, base, settings)
    sequences = [x[:, i : i + 1] for i in range(x.shape[1])]
    gram = attention_signatures(
        itertools.chain.from_iterable(
            block.attention_maps(block.normed(one, "attention")[None]) for one in sequences
        )
    )
    distances = group_distances(gram, base.num_key_value_heads)
    if not np.isfinite(distances).all():
        raise UserError(_NOT_FINITE)
    parts = partition_heads(distances, branches)
    norms = np.sqrt(sum(mlp_energy(block, one, parts) for one in sequences))
    if not np.isfinite(norms).all():
        raise UserError(_NOT_FINITE)
    return [group for part in match_heads_to_shards(norms) for group in parts[part]]


# ---- 1. what heads do -----------------------------------------------------------------------------------------------


def attention_signatures(chunks: Iterable[Tensor]) -> Tensor:
    """Inner products of the heads' attention maps over a stream of them: [heads, heads], float64.

    The distance of two heads over all of the calibration data follows from these alone, so that memory does not grow
    with the data.

    Args:
        chunks: attention probabilities [b, heads, queries, keys], of any b, queries and keys.

    Returns:
        For each pair of heads the sum over everything of the product of their probabilities.

    Raises:
        ValueError: the stream is empty.
    """
    gram: Tensor | None = None
    for chunk in chunks:
        flat = chunk.transpose(0, 1).flatten(1)
        product = (flat @ flat.T).double()
        gram = product if gram is None else gram + product
    if gram is None:
        raise ValueError("no attention probabilities; expected at least one chunk [b, heads, queries, keys]")
    return gram


def group_distances(gram: Tensor, kv_groups: int) -> Distances:
    """Euclidean distances [kv_groups, kv_groups] from the inner products [heads, heads] of attention maps.

    The distance of two groups is the sum over their pairs of heads; with one head per group, the heads' distance.
    """
    energy = gram.diagonal()
    heads = (energy[:, None] + energy[None, :] - 2 * gram).clamp(min=0).sqrt()
    heads.fill_diagonal_(0.0)
    per_group = gram.shape[0] // kv_groups
    groups = heads.view(kv_groups, per_group, kv_groups, per_group).sum((1, 3)).fill_diagonal_(0.0)
    return groups.cpu().numpy()


# ---- 2. which share a branch ----------------------------------------------------------------------------------------


def partition_heads(distance: Distances, branches: int) -> list[list[int]]:
    """``branches`` parts of equal size with the largest sum of distances inside the parts.

    Exact for up to :data:`EXACT_LIMIT` items and wherever parts have one item (dynamic programme over sets); beyond,
    pairwise exchanges until none helps, from several fixed random starts: deterministic, good, not proven best.

    Args:
        distance: symmetric [n, n].

    Returns:
        The parts, each ascending, ordered by their first item.

    Raises:
        ValueError: the distances are not square, symmetric and finite, or n does not divide.
    """
    distance = np.asarray(distance, dtype=np.float64)
    n = distance.shape[0]
    if distance.shape != (n, n) or not np.isfinite(distance).all() or not np.allclose(distance, distance.T):
        raise ValueError(f"distances of shape {list(distance.shape)}; expected finite and symmetric [n, n]")
    if branches < 1 or n % branches:
        raise ValueError(f"{n} items cannot be parted into {branches} equal parts")
    if branches in (1, n):
        return [list(range(n))] if branches == 1 else [[i] for i in range(n)]
    parts = _exact_partition(distance, branches) if n <= EXACT_LIMIT else _local_search(distance, branches)
    return sorted(sorted(int(i) for i in part) for part in parts)


def _exact_partition(distance: Distances, branches: int) -> list[tuple[int, ...]]:
    """Best way to every set of items that whole parts can make up; each part starts with the first item not yet in."""
    n = distance.shape[0]
    size = n // branches
    worth = {part: _inside(distance, part) for part in itertools.combinations(range(n), size)}
    best: dict[int, tuple[float, list[tuple[int, ...]]]] = {0: (0.0, [])}
    for _ in range(branches):
        longer: dict[int, tuple[float, list[tuple[int, ...]]]] = {}
        for taken, (total, parts) in best.items():
            free = [i for i in range(n) if not taken >> i & 1]
            for others in itertools.combinations(free[1:], size - 1):
                part = (free[0], *others)
                key = taken | sum(1 << i for i in part)
                value = total + worth[part]
                if key not in longer or value > longer[key][0]:
                    longer[key] = (value, [*parts, part])
        best = longer
    ((_, parts),) = best.values()
    return parts


def _local_search(distance: Distances, branches: int) -> list[list[int]]:
    """The best of several starts, each improved by the best exchange of two items until none gains."""
    n = distance.shape[0]
    generator = np.random.default_rng(0)
    best_total, best_labels = -np.inf, np.zeros(n, dtype=np.int64)
    for _ in range(_SEARCH_STARTS):
        labels = generator.permutation(np.arange(n) % branches)
        while True:
            member = np.eye(branches)[labels]
            # to_part[i, c]: distance from item i to all of part c. Exchanging i and j gains what each finds in the
            # other's part over what it leaves; their own distance, counted there twice, is not found.
            to_part = distance @ member
            move = to_part[:, labels] - to_part[np.arange(n), labels][:, None]
            gain = move + move.T - 2 * distance
            gain[labels[:, None] == labels[None, :]] = 0.0
            i, j = np.unravel_index(np.argmax(gain), gain.shape)
            if gain[i, j] <= 1e-9 * (1.0 + distance.max()):
                break
            labels[i], labels[j] = labels[j], labels[i]
        total = float(distance[labels[:, None] == labels[None, :]].sum())
        if total > best_total:
            best_total, best_labels = total, labels
    return [np.flatnonzero(best_labels == c).tolist() for c in range(branches)]


def _inside(distance: Distances, part: Sequence[int]) -> float:
    return float(distance[np.ix_(part, part)].sum()) / 2


# ---- 3. which branch they become ------------------------------------------------------------------------------------


def mlp_energy(block: BlockFormulas, x: Tensor, parts: Sequence[Sequence[int]]) -> Distances:
    """Squared norms [parts, shards] of F_shard(norm(X + b_o + A_part)) over all tokens but the first; x [s, b, h]."""
    context = block.context(block.normed(x, "attention")[None])[1:]
    output, bias = block.weights["self_attn.o_proj.weight"], block.output_bias("attention")
    width = output.shape[1] // block.base.num_key_value_heads
    energy = np.zeros((len(parts), len(parts)))
    shards = block.weights["mlp.down_proj.weight"].chunk(len(parts), 1)
    for row, part in enumerate(parts):
        columns = torch.cat([torch.arange(g * width, (g + 1) * width, device=x.device) for g in part])
        u = x[1:] + context[..., columns] @ output[:, columns].T
        act = block.activations(block.normed(u if bias is None else u + bias, "mlp")[None])
        for column, (neurons, down) in enumerate(zip(act.chunk(len(parts), -1), shards, strict=True)):
            energy[row, column] = (neurons @ down.T).double().square().sum().item()
    return energy


def match_heads_to_shards(norms: Distances) -> list[int]:
    """``order[g]``: the part of heads for MLP shard g, so that the sum of the matched norms is largest (exact).

    Args:
        norms: [parts, shards], norm of the MLP output of every pair.
    """
    parts, shards = linear_sum_assignment(norms, maximize=True)
    return [int(part) for _, part in sorted(zip(shards.tolist(), parts.tolist(), strict=True))]
