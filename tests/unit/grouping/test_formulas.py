"""The block in plain operations against the float64 formula, branch by branch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_spd.grouping.formulas import BlockFormulas
from tests.calibration_cases import base_of, settings_of
from tests.reference import Shape, attention_branch, mlp_branch, random_block, rms_norm

SHAPES = {
    "mha": (Shape(hidden=24, heads=6, kv_groups=6, head_dim=4, ffn=30), 3),
    "gqa": (Shape(hidden=16, heads=8, kv_groups=4, head_dim=6, ffn=24), 2),
    "one group each": (Shape(hidden=16, heads=12, kv_groups=4, head_dim=4, ffn=16), 4),
    "plain": (Shape(hidden=16, heads=4, kv_groups=2, head_dim=4, ffn=16, gated=False), 2),
}


def case(name: str, biases: bool, copies: int) -> tuple[BlockFormulas, Shape, int, Tensor]:
    """The formulas of a random block and inputs [copies, s, b, h]; ``copies`` 0: one for every branch."""
    shape, branches = SHAPES[name]
    generator = torch.Generator().manual_seed(3)
    weights = random_block(shape, branches, generator, biases)
    block = BlockFormulas(weights, base_of(shape), settings_of(shape), branches)
    z = torch.randn(copies or branches, 7, 2, shape.hidden, generator=generator, dtype=torch.float64)
    return block, shape, branches, z


@pytest.mark.parametrize("copies", [0, 1], ids=["own inputs", "one input"])
@pytest.mark.parametrize("biases", [True, False], ids=["biases", "no biases"])
@pytest.mark.parametrize("name", SHAPES)
def test_every_branch_is_the_reference(name: str, biases: bool, copies: int) -> None:
    block, shape, branches, z = case(name, biases, copies)
    for sublayer, reference in (("attention", attention_branch), ("mlp", mlp_branch)):
        got = block.partial(sublayer, z)
        wanted = [reference(z[g % len(z)], block.weights, shape, g, branches) for g in range(branches)]
        torch.testing.assert_close(got, torch.stack(wanted), rtol=1e-12, atol=1e-12)
        # The branches differ, so that being equal says something.
        assert (got[0] - got[1]).abs().max() > 0.1


@pytest.mark.parametrize("name", SHAPES)
def test_branches_of_one_input_add_up_to_the_dense_block(name: str) -> None:
    block, _, _, z = case(name, True, 1)
    whole = BlockFormulas(block.weights, block.base, block.settings)
    for sublayer in ("attention", "mlp"):
        torch.testing.assert_close(block.partial(sublayer, z).sum(0), whole.partial(sublayer, z)[0])


@pytest.mark.parametrize(
    ("sublayer", "norm", "projection"),
    [
        ("attention", "input_layernorm", "self_attn.o_proj"),
        ("mlp", "post_attention_layernorm", "mlp.down_proj"),
    ],
)
def test_norm_and_output_bias_of_a_sublayer(sublayer: str, norm: str, projection: str) -> None:
    block, shape, _, z = case("gqa", True, 0)
    wanted = rms_norm(z, block.weights[f"{norm}.weight"], shape.eps)
    torch.testing.assert_close(block.normed(z, sublayer), wanted)
    assert block.output_bias(sublayer) is block.weights[f"{projection}.bias"]
    assert case("gqa", False, 0)[0].output_bias(sublayer) is None


def test_maps_in_pieces_make_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention probabilities applied to the values are what o_proj sees, however few rows are held at a time."""
    block, shape, _, z = case("gqa", True, 1)
    whole = torch.cat(list(block.attention_maps(z)), 2)
    values = block.read(z, "self_attn.v_proj").unflatten(-1, (-1, shape.head_dim))
    values = values.repeat_interleave(shape.heads // shape.kv_groups, 2)
    context = torch.einsum("bnst,tbnd->sbnd", whole, values).flatten(2)
    torch.testing.assert_close(context, block.context(z))
    monkeypatch.setattr("megatron_spd.grouping.formulas._CHUNK_ELEMENTS", 3 * 2 * shape.heads * 7)
    pieces = list(block.attention_maps(z))
    assert [piece.shape[2] for piece in pieces] == [3, 3, 1]
    torch.testing.assert_close(torch.cat(pieces, 2), whole)
