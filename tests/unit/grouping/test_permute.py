"""Permuting a block: nothing changes for one branch, everything for several, and the inverse restores it."""

from __future__ import annotations

import pytest
import torch

from megatron_spd.grouping.permute import inverse_order, permute_block
from megatron_spd.models.llama import LLAMA
from megatron_spd.plan import BaseModel
from tests.reference import Shape, blocks_forward, random_block

SHAPES = {
    "gqa": Shape(hidden=24, heads=6, kv_groups=3, head_dim=4, ffn=30),
    "mha": Shape(hidden=16, heads=4, kv_groups=4, head_dim=6, ffn=20),
    "plain_mlp": Shape(hidden=16, heads=8, kv_groups=4, head_dim=2, ffn=12, gated=False),
}


def base_of(shape: Shape) -> BaseModel:
    return BaseModel("f", "llama", 1, shape.hidden, shape.heads, shape.kv_groups, shape.ffn)


def random_order(n: int, generator: torch.Generator) -> list[int]:
    """A permutation that is not the identity and sends at least one item across the halves."""
    while True:
        order = torch.randperm(n, generator=generator).tolist()
        if set(order[: n // 2]) != set(range(n // 2)):
            return order


def permuted(weights, shape, kv_group_order, neuron_order):
    return permute_block(weights, LLAMA, base_of(shape), shape.head_dim, kv_group_order, neuron_order)


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("what", ["kv", "neurons", "both"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_one_branch_is_unchanged_and_several_are_not(shape, what, biases):
    generator = torch.Generator().manual_seed(3)
    weights = random_block(shape, 1, generator, biases)
    x = torch.randn(5, 2, shape.hidden, generator=generator, dtype=torch.float64)
    kv_order = random_order(shape.kv_groups, generator) if what != "neurons" else None
    neuron_order = random_order(shape.ffn, generator) if what != "kv" else None
    moved = permuted(weights, shape, kv_order, neuron_order)

    dense = blocks_forward(x, [weights], shape, 1, [])
    torch.testing.assert_close(blocks_forward(x, [moved], shape, 1, []), dense, rtol=0, atol=1e-11)
    branches = 3 if shape.kv_groups == 3 else 2
    before = blocks_forward(x, [weights], shape, branches, [0])
    after = blocks_forward(x, [moved], shape, branches, [0])
    assert (after - before).abs().max() > 1e-2


def test_shapes_dtypes_and_inverse():
    shape = SHAPES["gqa"]
    generator = torch.Generator().manual_seed(0)
    weights = random_block(shape, 3, generator, biases=True, shifts=(True, True), norms=(True, True))
    kv_order, neuron_order = random_order(3, generator), random_order(30, generator)
    moved = permuted(weights, shape, kv_order, neuron_order)
    assert moved.keys() == weights.keys()
    back = permuted(moved, shape, inverse_order(kv_order), inverse_order(neuron_order))
    for name, tensor in weights.items():
        assert moved[name].shape == tensor.shape
        assert moved[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor)


def test_place_j_holds_original_order_j():
    """The convention of the plan, on single rows: query heads follow their group, biases their rows."""
    shape = SHAPES["gqa"]
    weights = random_block(shape, 1, torch.Generator().manual_seed(1), biases=True)
    moved = permuted(weights, shape, [2, 0, 1], [29, *range(29)])
    d, queries = shape.head_dim, 2 * shape.head_dim
    assert torch.equal(moved["self_attn.k_proj.weight"][:d], weights["self_attn.k_proj.weight"][2 * d :])
    assert torch.equal(moved["self_attn.v_proj.bias"][d : 2 * d], weights["self_attn.v_proj.bias"][:d])
    assert torch.equal(
        moved["self_attn.q_proj.weight"][:queries], weights["self_attn.q_proj.weight"][2 * queries :]
    )
    assert torch.equal(
        moved["self_attn.o_proj.weight"][:, :queries], weights["self_attn.o_proj.weight"][:, -queries:]
    )
    assert torch.equal(moved["mlp.gate_proj.bias"][0], weights["mlp.gate_proj.bias"][29])
    assert torch.equal(moved["mlp.down_proj.weight"][:, 1], weights["mlp.down_proj.weight"][:, 0])


def test_untouched_tensors_are_not_copied():
    shape = SHAPES["gqa"]
    generator = torch.Generator().manual_seed(2)
    weights = random_block(shape, 3, generator, biases=True, shifts=(True, True), norms=(True, True))
    assert all(permuted(weights, shape, None, None)[name] is tensor for name, tensor in weights.items())
    moved = permuted(weights, shape, [1, 0, 2], None)
    same = {name for name in weights if moved[name] is weights[name]}
    attention_rows = {f"self_attn.{p}_proj.{kind}" for p in "qkv" for kind in ("weight", "bias")}
    assert same == weights.keys() - attention_rows - {"self_attn.o_proj.weight"}


def test_inverse_order():
    assert inverse_order([2, 0, 3, 1]) == [1, 3, 0, 2]


@pytest.mark.parametrize(
    ("kv_order", "neuron_order", "words"),
    [
        ([0, 0, 1], None, r"key/value groups .* permutation of 0\.\.2"),
        ([0, 1], None, r"order of 2 key/value groups"),
        (None, [*range(29), 28], r"MLP neurons .* permutation of 0\.\.29"),
    ],
)
def test_bad_order(kv_order, neuron_order, words):
    shape = SHAPES["gqa"]
    weights = random_block(shape, 1, torch.Generator().manual_seed(2), biases=False)
    with pytest.raises(ValueError, match=words):
        permuted(weights, shape, kv_order, neuron_order)


def test_wrong_size_names_the_tensor():
    shape = SHAPES["gqa"]
    weights = random_block(shape, 1, torch.Generator().manual_seed(2), biases=False)
    weights["self_attn.o_proj.weight"] = weights["self_attn.o_proj.weight"][:, 1:]
    with pytest.raises(ValueError, match=r"self_attn\.o_proj\.weight has shape \[24, 23\]; expected 3 x 8"):
        permuted(weights, shape, [1, 0, 2], None)


def test_unknown_name():
    shape = SHAPES["gqa"]
    with pytest.raises(KeyError, match="rotary"):
        permuted({"self_attn.rotary": torch.ones(2)}, shape, None, None)
