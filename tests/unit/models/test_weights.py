"""Hugging Face tensors to Megatron-core parameters and back."""

from __future__ import annotations

import pytest
import torch

from megatron_spd.models.llama import LLAMA
from megatron_spd.models.weights import from_megatron, shard_block, to_megatron, unshard_block
from tests.reference import Shape, random_block

SHAPE = Shape(hidden=10, heads=12, kv_groups=6, head_dim=4, ffn=18)
ALL = [t.name for t in LLAMA.tables.megatron]
BRANCH = [t.name for t in LLAMA.branch_tensors]


@pytest.mark.parametrize(("branches", "ranks"), [(6, 1), (6, 2), (6, 3), (6, 6), (2, 6), (1, 3)])
@pytest.mark.parametrize("biases", [False, True])
def test_round_trip_is_exact(branches: int, ranks: int, biases: bool) -> None:
    weights = random_block(
        SHAPE, branches, torch.Generator().manual_seed(0), biases, (True, True), (True, True)
    )
    groups = SHAPE.kv_groups // ranks
    back = []
    for rank in range(ranks):
        shard = shard_block(weights, LLAMA, rank, ranks)
        state = to_megatron(shard, LLAMA, groups, [*ALL, *BRANCH])
        assert {state[name].shape for name in BRANCH} == {(max(1, branches // ranks), SHAPE.hidden)}
        assert state["mlp.linear_fc1.weight"].shape == (2 * SHAPE.ffn // ranks, SHAPE.hidden)
        back.append(from_megatron(state, LLAMA, groups, SHAPE.head_dim, weights))
    full = unshard_block(back, LLAMA, branches)
    assert set(full) == set(weights)
    for name, tensor in weights.items():
        assert torch.equal(full[name], tensor), name


def test_qkv_is_interleaved_by_key_value_group() -> None:
    weights = random_block(SHAPE, 1, torch.Generator().manual_seed(0), False)
    qkv = to_megatron(weights, LLAMA, SHAPE.kv_groups, ["self_attention.linear_qkv.weight"])
    rows = qkv["self_attention.linear_qkv.weight"].view(6, 4 * 4, 10)
    # Group 2: query heads 4 and 5, key head 2, value head 2.
    assert torch.equal(rows[2, :8], weights["self_attn.q_proj.weight"][16:24])
    assert torch.equal(rows[2, 8:12], weights["self_attn.k_proj.weight"][8:12])
    assert torch.equal(rows[2, 12:], weights["self_attn.v_proj.weight"][8:12])


def test_absent_biases_are_zero_and_other_absences_are_not() -> None:
    weights = random_block(SHAPE, 1, torch.Generator().manual_seed(0), False)
    state = to_megatron(weights, LLAMA, SHAPE.kv_groups, ALL)
    assert not state["self_attention.linear_qkv.bias"].any()
    del weights["mlp.up_proj.weight"]
    with pytest.raises(KeyError, match="up_proj"):
        to_megatron(weights, LLAMA, SHAPE.kv_groups, ALL)
