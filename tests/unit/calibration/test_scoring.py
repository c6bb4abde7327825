"""Scores of hidden states against whole logits in float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from megatron_spd.calibration.scoring import OutputLayer
from megatron_spd.models.norm import Norm

HIDDEN = 12


def case(vocabulary: int, positions: int) -> tuple[OutputLayer, Tensor, Tensor]:
    """An output layer in float64, and two sets of hidden states [positions, HIDDEN]."""
    generator = torch.Generator().manual_seed(vocabulary)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    layer = OutputLayer(Norm("RMSNorm", 1e-5, random(HIDDEN).abs()), random(vocabulary, HIDDEN) * 2)
    return layer, random(positions, HIDDEN), random(positions, HIDDEN)


def log_probabilities(layer: OutputLayer, rows: Tensor) -> Tensor:
    scale = rows.square().mean(-1, keepdim=True).add(layer.norm.eps).rsqrt()
    return (rows * scale * layer.norm.weight @ layer.table.T).log_softmax(-1)


#: Vocabularies and positions that end inside a slice, on its border, and behind it.
SIZES = [(7, 3), (1024, 512), (2500, 1100)]


@pytest.mark.parametrize(("vocabulary", "positions"), SIZES)
def test_negative_log_likelihood(vocabulary: int, positions: int) -> None:
    layer, rows, _ = case(vocabulary, positions)
    targets = torch.arange(positions) * 5 % vocabulary
    wanted = -log_probabilities(layer, rows).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(layer.negative_log_likelihood(rows, targets), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("vocabulary", "positions"), SIZES)
def test_divergence(vocabulary: int, positions: int) -> None:
    layer, rows, plain = case(vocabulary, positions)
    p, q = log_probabilities(layer, plain), log_probabilities(layer, rows)
    wanted = (p.exp() * (p - q)).sum(-1)
    assert wanted.mean() > 1
    torch.testing.assert_close(layer.divergence(rows, plain), wanted, rtol=1e-4, atol=1e-4)


def test_divergence_from_itself_is_nothing_and_a_sharp_prediction_does_not_overflow() -> None:
    layer, rows, plain = case(2500, 40)
    assert layer.divergence(rows, rows).abs().max() == 0
    sharp = OutputLayer(dataclasses.replace(layer.norm, weight=layer.norm.weight * 100), layer.table)
    found = sharp.divergence(rows, plain)
    assert bool(found.isfinite().all())
    assert found.mean() > 10
