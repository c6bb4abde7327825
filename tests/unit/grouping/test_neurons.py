"""Costs of neurons in branches against the formulas, one neuron and one branch at a time."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from megatron_spd.grouping.formulas import BlockFormulas
from megatron_spd.grouping.neurons import ReadingCost, WritingCost, energy_seen
from megatron_spd.runtime.distributed import Runtime
from tests.calibration_cases import base_of, settings_of
from tests.reference import Shape, random_block

BRANCHES, TOKENS = 3, 40
SHAPES = {
    "gated": Shape(hidden=8, heads=6, kv_groups=3, head_dim=4, ffn=12),
    "plain": Shape(hidden=8, heads=6, kv_groups=6, head_dim=2, ffn=9, gated=False),
}


def case(name: str, biases: bool) -> tuple[BlockFormulas, BlockFormulas, Tensor, Tensor]:
    """A block, the next one, and normed inputs: dense [n, h], by branch [G, n, h]."""
    shape = SHAPES[name]
    generator = torch.Generator().manual_seed(1)
    block, following = (
        BlockFormulas(random_block(shape, 1, generator, biases), base_of(shape), settings_of(shape))
        for _ in range(2)
    )
    z = torch.randn(TOKENS, shape.hidden, generator=generator, dtype=torch.float64)
    own = z + 0.3 * torch.randn(BRANCHES, TOKENS, shape.hidden, generator=generator, dtype=torch.float64)
    return block, following, z, own


def neuron(block: BlockFormulas, n: int, z: Tensor) -> Tensor:
    """act_n(z) [tokens] of one neuron, from its rows."""

    def read(name: str) -> Tensor:
        out = z @ block.weights[f"mlp.{name}.weight"][n]
        return out + block.weights[f"mlp.{name}.bias"][n] if f"mlp.{name}.bias" in block.weights else out

    if "mlp.gate_proj.weight" in block.weights:
        return functional.silu(read("gate_proj")) * read("up_proj")
    return functional.silu(read("up_proj"))


@pytest.mark.parametrize("size", [1, 13, TOKENS])
@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("name", SHAPES)
def test_reading_cost_is_the_formula(runtime: Runtime, name: str, biases: bool, size: int) -> None:
    block, _, z, own = case(name, biases)
    streamed = ReadingCost(block, BRANCHES)
    for rows in torch.arange(TOKENS).split(size):
        streamed.add(z[rows], own[:, rows])
    cost = streamed.cost(runtime)
    assert cost.shape == (SHAPES[name].ffn, BRANCHES)
    down = block.weights["mlp.down_proj.weight"]
    for n, g in itertools.product(range(len(cost)), range(BRANCHES)):
        change = neuron(block, n, z) - neuron(block, n, own[g])
        wanted = change.square().mean() * down[:, n].square().sum()
        assert float(cost[n, g]) == pytest.approx(float(wanted), rel=1e-6)


def test_reading_cost_is_the_error_at_the_output(runtime: Runtime) -> None:
    """A single neuron that reads z_g instead of z is off by its cost at the MLP's output."""
    block, _, z, own = case("gated", True)
    streamed = ReadingCost(block, BRANCHES)
    streamed.add(z, own)
    true, blind = block.activations(z[None]), block.activations(own[1][None])
    for n in (0, 7):
        changed = true.clone()
        changed[:, n] = blind[:, n]
        error = block.project(changed, "mlp.down_proj") - block.project(true, "mlp.down_proj")
        energy = error.square().sum() / TOKENS
        assert float(streamed.cost(runtime)[n, 1]) == pytest.approx(float(energy), rel=1e-6)


@pytest.mark.parametrize("name", SHAPES)
def test_what_the_next_block_sees_of_a_neuron(name: str) -> None:
    block, following, _, _ = case(name, False)
    seen = energy_seen(block, following, BRANCHES)
    for n, g in itertools.product(range(len(seen)), range(BRANCHES)):
        vector = following.weights["input_layernorm.weight"] * block.weights["mlp.down_proj.weight"][:, n]
        wanted = 0.0
        for part in "qkv":
            w = following.weights[f"self_attn.{part}_proj.weight"]
            rows = len(w) // BRANCHES
            wanted += float((w[g * rows : (g + 1) * rows] @ vector).square().sum())
        assert float(seen[n, g]) == pytest.approx(wanted)


@pytest.mark.parametrize("size", [1, 13, TOKENS])
def test_writing_cost_is_variance_times_what_is_seen(runtime: Runtime, size: int) -> None:
    block, following, z, _ = case("gated", True)
    streamed = WritingCost(block, following, BRANCHES)
    activations = block.activations(z[None])
    for rows in activations.split(size):
        streamed.add(rows)
    wanted = -activations.var(0, correction=0)[:, None] * energy_seen(block, following, BRANCHES)
    torch.testing.assert_close(streamed.cost(runtime), wanted)
    # Reading it does not change it, and a constant is not missed: it has no variance.
    torch.testing.assert_close(streamed.cost(runtime), wanted)
    constant = WritingCost(block, following, BRANCHES)
    constant.add(torch.full_like(activations, 0.25))
    torch.testing.assert_close(constant.cost(runtime), torch.zeros_like(wanted))


def test_costs_do_not_grow_with_the_tokens(runtime: Runtime) -> None:
    """Means: the same text twice costs the same, in memory of the same size."""
    block, _, z, own = case("gated", True)
    once, twice = ReadingCost(block, BRANCHES), ReadingCost(block, BRANCHES)
    once.add(z, own)
    twice.add(z, own)
    held = sum(t.nbytes for t in vars(twice).values() if isinstance(t, Tensor))
    twice.add(z, own)
    assert sum(t.nbytes for t in vars(twice).values() if isinstance(t, Tensor)) == held
    torch.testing.assert_close(once.cost(runtime), twice.cost(runtime))
