"""Head grouping: every step against brute force or the plain formula, and the whole on constructed blocks."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from megatron_spd.errors import UserError
from megatron_spd.grouping.formulas import AttentionSettings, BlockFormulas
from megatron_spd.grouping.heads import (
    EXACT_LIMIT,
    attention_signatures,
    group_distances,
    group_heads,
    match_heads_to_shards,
    mlp_energy,
    partition_heads,
)
from megatron_spd.grouping.permute import permute_block
from megatron_spd.models.llama import LLAMA
from megatron_spd.plan import BaseModel
from tests.reference import Shape, attention_branch, blocks_forward, mlp_branch, random_block, rms_norm, rope


def inside(distance, parts):
    return sum(distance[np.ix_(part, part)].sum() / 2 for part in parts)


def all_partitions(items, size):
    """Every partition of ``items`` into parts of ``size``."""
    if not items:
        yield []
        return
    for others in itertools.combinations(items[1:], size - 1):
        part = [items[0], *others]
        for rest in all_partitions([i for i in items if i not in part], size):
            yield [part, *rest]


def random_distances(n, seed):
    """Euclidean distances of random points."""
    points = np.random.default_rng(seed).normal(size=(n, 3))
    return np.linalg.norm(points[:, None] - points[None], axis=-1)


def kinds_distances(kinds):
    """Distance 1 between heads of different kinds, 0 within a kind."""
    kinds = np.array(kinds)
    return (kinds[:, None] != kinds[None, :]).astype(float)


# ---- partition ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("n", "branches"), [(4, 2), (6, 2), (6, 3), (8, 2), (8, 4), (9, 3), (10, 5)])
def test_partition_is_the_best_of_all(n, branches, seed):
    distance = random_distances(n, seed)
    parts = partition_heads(distance, branches)
    assert sorted(i for part in parts for i in part) == list(range(n))
    assert {len(part) for part in parts} == {n // branches}
    best = max(inside(distance, p) for p in all_partitions(list(range(n)), n // branches))
    assert inside(distance, parts) == pytest.approx(best)


def test_heads_of_one_kind_are_spread():
    kinds = [0, 0, 0, 1, 1, 1, 2, 2, 2]
    for part in partition_heads(kinds_distances(kinds), 3):
        assert sorted(kinds[i] for i in part) == [0, 1, 2]


def test_many_heads_of_few_kinds_are_spread():
    """Beyond the exact limit, on a case whose best value is known: every branch holds every kind once."""
    kinds = [i // 8 for i in range(32)]
    assert len(kinds) > EXACT_LIMIT
    for part in partition_heads(kinds_distances(kinds), 8):
        assert sorted(kinds[i] for i in part) == [0, 1, 2, 3]


@pytest.mark.parametrize(("n", "branches"), [(18, 9), (20, 2)])
def test_heuristic_beats_random_partitions_and_no_exchange_helps(n, branches):
    distance = random_distances(n, 5)
    parts = partition_heads(distance, branches)
    found = inside(distance, parts)
    rng = np.random.default_rng(1)
    drawn = (np.split(rng.permutation(n), branches) for _ in range(300))
    assert found > max(inside(distance, p) for p in drawn)
    for a, b in itertools.combinations(range(branches), 2):
        for i, j in itertools.product(range(n // branches), repeat=2):
            other = [list(part) for part in parts]
            other[a][i], other[b][j] = other[b][j], other[a][i]
            assert inside(distance, other) <= found + 1e-9


def test_heuristic_agrees_with_the_exact_answer(monkeypatch):
    distance = random_distances(12, 2)
    exact = partition_heads(distance, 3)
    monkeypatch.setattr("megatron_spd.grouping.heads.EXACT_LIMIT", 0)
    assert inside(distance, partition_heads(distance, 3)) == pytest.approx(inside(distance, exact))


def test_trivial_partitions():
    distance = random_distances(20, 0)
    assert partition_heads(distance, 1) == [list(range(20))]
    assert partition_heads(distance, 20) == [[i] for i in range(20)]


@pytest.mark.parametrize(
    ("distance", "branches", "words"),
    [
        (np.zeros((4, 3)), 2, r"shape \[4, 3\]"),
        (np.array([[0.0, 1.0], [2.0, 0.0]]), 2, "symmetric"),
        (np.full((2, 2), math.nan), 2, "finite"),
        (np.zeros((4, 4)), 3, "4 items cannot be parted into 3"),
    ],
)
def test_bad_distances(distance, branches, words):
    with pytest.raises(ValueError, match=words):
        partition_heads(distance, branches)


# ---- matching -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_matching_is_the_best_of_all(seed):
    norms = np.random.default_rng(seed).random((5, 5))
    order = match_heads_to_shards(norms)
    assert sorted(order) == list(range(5))
    best = max(sum(norms[p, g] for g, p in enumerate(o)) for o in itertools.permutations(range(5)))
    assert sum(norms[p, g] for g, p in enumerate(order)) == pytest.approx(best)


def test_matching_names_the_part_for_each_shard():
    norms = np.array([[0.0, 0.0, 9.0], [9.0, 0.0, 0.0], [0.0, 9.0, 0.0]])
    assert match_heads_to_shards(norms) == [1, 2, 0]


# ---- signatures -----------------------------------------------------------------------------------------------------


def test_streamed_distances_are_those_of_whole_maps():
    maps = torch.rand(6, 4, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    flat = maps.transpose(0, 1).flatten(1)
    direct = torch.cdist(flat, flat)
    whole = group_distances(attention_signatures([maps]), 4)
    pieces = [p for half in maps.split(2) for p in half.split(2, dim=2)]
    streamed = group_distances(attention_signatures(iter(pieces)), 4)
    np.testing.assert_allclose(whole, direct, atol=1e-6)
    np.testing.assert_allclose(streamed, whole, atol=1e-6)

    per_group = group_distances(attention_signatures([maps]), 2)
    between = direct[:2, 2:].sum().item()
    np.testing.assert_allclose(per_group, [[0.0, between], [between, 0.0]], atol=1e-6)


def test_no_signatures():
    with pytest.raises(ValueError, match="at least one chunk"):
        attention_signatures([])


# ---- whole blocks ---------------------------------------------------------------------------------------------------


def settings_of(shape):
    inv_freq = shape.rope_theta ** (-torch.arange(0, shape.head_dim, 2, dtype=torch.float64) / shape.head_dim)
    return AttentionSettings(shape.head_dim, inv_freq, shape.eps)


def base_of(shape):
    return BaseModel("f", "llama", 1, shape.hidden, shape.heads, shape.kv_groups, shape.ffn)


def reference_maps(x, w, shape):
    """Attention probabilities [b, heads, s, s], straight from the definition."""
    s, b, _ = x.shape
    z = rms_norm(x, w["input_layernorm.weight"], shape.eps)
    q, k = (z @ w[f"self_attn.{p}_proj.weight"].T + w.get(f"self_attn.{p}_proj.bias", 0.0) for p in "qk")
    q = rope(q.view(s, b, shape.heads, shape.head_dim), shape.rope_theta)
    k = rope(k.view(s, b, shape.kv_groups, shape.head_dim), shape.rope_theta)
    k = k.repeat_interleave(shape.heads // shape.kv_groups, 2)
    scores = torch.einsum("sbnd,tbnd->bnst", q, k) / shape.head_dim**0.5
    return scores.masked_fill(torch.triu(torch.ones(s, s, dtype=torch.bool), 1), float("-inf")).softmax(-1)


def objective(order, distance, branches):
    return inside(distance, np.split(np.array(order), branches))


def matched_norm(order, x, w, shape, branches):
    """Sum over branches of the norm of F_g(norm(X + b_o + A_g)) when the groups stand in ``order``."""
    moved = permute_block(w, LLAMA, base_of(shape), shape.head_dim, order, None)
    total = 0.0
    for g in range(branches):
        z = rms_norm(x, w["input_layernorm.weight"], shape.eps)
        u = x + attention_branch(z, moved, shape, g, branches) + w.get("self_attn.o_proj.bias", 0.0)
        out = mlp_branch(rms_norm(u, w["post_attention_layernorm.weight"], shape.eps), w, shape, g, branches)
        total += out[1:].norm().item()
    return total


CASES = {
    "mha": (Shape(hidden=24, heads=6, kv_groups=6, head_dim=4, ffn=30), 3, True),
    "gqa": (Shape(hidden=16, heads=8, kv_groups=4, head_dim=4, ffn=16), 2, True),
    "plain": (Shape(hidden=16, heads=4, kv_groups=4, head_dim=6, ffn=16, gated=False), 2, False),
    "one_each": (Shape(hidden=16, heads=6, kv_groups=3, head_dim=4, ffn=12), 3, True),
}


@pytest.mark.parametrize("rows_at_a_time", [None, 2])
@pytest.mark.parametrize(("shape", "branches", "biases"), CASES.values(), ids=CASES)
def test_group_heads_is_the_published_choice(shape, branches, biases, rows_at_a_time, monkeypatch):
    """Against all orders: first the largest distances inside branches, then the largest matched MLP norms."""
    if rows_at_a_time:
        s = 7
        monkeypatch.setattr(
            "megatron_spd.grouping.formulas._CHUNK_ELEMENTS", rows_at_a_time * shape.heads * s
        )
    generator = torch.Generator().manual_seed(11)
    w = random_block(shape, branches, generator, biases)
    x = torch.randn(7, 3, shape.hidden, generator=generator, dtype=torch.float64)
    order = group_heads(w, x, base_of(shape), branches, settings_of(shape))

    distance = group_distances(attention_signatures([reference_maps(x, w, shape)]), shape.kv_groups)
    size = shape.kv_groups // branches
    best = max(inside(distance, p) for p in all_partitions(list(range(shape.kv_groups)), size))
    assert objective(order, distance, branches) == pytest.approx(best)
    parts = [order[g * size : (g + 1) * size] for g in range(branches)]
    orders = [tuple(itertools.chain(*arranged)) for arranged in itertools.permutations(parts)]
    norms = {candidate: matched_norm(list(candidate), x, w, shape, branches) for candidate in orders}
    assert norms[tuple(order)] == pytest.approx(max(norms.values()))


def test_the_plan_alone_reproduces_it_and_the_dense_block_is_unchanged():
    shape, branches, _ = CASES["gqa"]
    generator = torch.Generator().manual_seed(4)
    w = random_block(shape, branches, generator, biases=True)
    x = torch.randn(6, 2, shape.hidden, generator=generator, dtype=torch.float64)
    order = group_heads(w, x, base_of(shape), branches, settings_of(shape))
    assert order == group_heads(w, x, base_of(shape), branches, settings_of(shape))
    moved = permute_block(w, LLAMA, base_of(shape), shape.head_dim, order, None)
    assert {n: t.shape for n, t in moved.items()} == {n: t.shape for n, t in w.items()}
    dense = blocks_forward(x, [w], shape, 1, [])
    torch.testing.assert_close(blocks_forward(x, [moved], shape, 1, []), dense, rtol=0, atol=1e-11)


def test_heads_that_do_the_same_are_parted():
    """Heads 0, 1 and heads 2, 3 have the same queries and keys: no branch may hold two of the same."""
    shape = Shape(hidden=16, heads=4, kv_groups=4, head_dim=4, ffn=8)
    generator = torch.Generator().manual_seed(9)
    w = random_block(shape, 2, generator, biases=False)
    for name in ("self_attn.q_proj.weight", "self_attn.k_proj.weight"):
        heads = w[name].view(4, 4, 16)
        heads[1], heads[3] = heads[0], heads[2]
    x = torch.randn(8, 2, 16, generator=generator, dtype=torch.float64)
    order = group_heads(w, x, base_of(shape), 2, settings_of(shape))
    assert {i // 2 for i in order[:2]} == {i // 2 for i in order[2:]} == {0, 1}


@pytest.mark.parametrize(("shape", "branches", "biases"), CASES.values(), ids=CASES)
def test_norms_of_every_pair_of_heads_and_shard(shape, branches, biases):
    """|F_shard(norm(X + b_o + A_part))| with first-position tokens left out, however massive they are."""
    generator = torch.Generator().manual_seed(2)
    w = random_block(shape, branches, generator, biases)
    x = torch.randn(6, shape.hidden, generator=generator, dtype=torch.float64)
    x[0] *= 1000.0
    parts = [list(range(g, shape.kv_groups, branches)) for g in range(branches)]
    block = BlockFormulas(w, base_of(shape), settings_of(shape))
    z = block.normed(x[:, None], "attention")[None]
    torch.testing.assert_close(
        torch.cat(list(block.attention_maps(z)), 2), reference_maps(x[:, None], w, shape)
    )
    energy = mlp_energy(block, x[:, None], parts)

    order = [i for part in parts for i in part]
    moved = permute_block(w, LLAMA, base_of(shape), shape.head_dim, order, None)
    z = rms_norm(x[:, None], w["input_layernorm.weight"], shape.eps)
    for row, column in itertools.product(range(branches), repeat=2):
        u = (
            x[:, None]
            + attention_branch(z, moved, shape, row, branches)
            + w.get("self_attn.o_proj.bias", 0.0)
        )
        z_mlp = rms_norm(u, w["post_attention_layernorm.weight"], shape.eps)
        out = mlp_branch(z_mlp, w, shape, column, branches)
        assert energy[row, column] == pytest.approx(out[1:].square().sum().item())


def test_one_branch_and_bad_input():
    shape = Shape(hidden=8, heads=4, kv_groups=2, head_dim=2, ffn=8)
    w = random_block(shape, 1, torch.Generator().manual_seed(0), biases=False)
    x = torch.randn(4, 1, 8, dtype=torch.float64)
    assert group_heads(w, x, base_of(shape), 1, settings_of(shape)) == [0, 1]
    with pytest.raises(UserError, match="G = 4 branches do not divide"):
        group_heads(w, x, base_of(shape), 4, settings_of(shape))
    with pytest.raises(ValueError, match=r"x has shape \[1, 1, 8\]; expected \[s > 1, b, 8\]"):
        group_heads(w, x[:1], base_of(shape), 2, settings_of(shape))
