"""Losses on block outputs against their formulas."""

from __future__ import annotations

import pytest
import torch

from megatron_spd.distill.losses import LOSSES, make_loss


def outputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(5, 2, 4, generator=generator) for _ in range(2))
    return student, teacher, torch.rand(4, generator=generator)


def by_hand(name: str) -> float:
    """Token by token, the first position left out."""
    student, teacher, weights = outputs()
    total, tokens = 0.0, 0
    for s in range(1, 5):
        for b in range(2):
            error = (student[s, b] - teacher[s, b]).double()
            squares = error.square()
            if name == "nmse":
                total += float(squares.sum() / teacher[s, b].double().square().sum())
            else:
                total += float((squares * (weights.double() if name == "fisher" else 1)).sum()) / 4
            tokens += 1
    return total / tokens


@pytest.mark.parametrize("name", LOSSES)
def test_formula(name: str) -> None:
    student, teacher, weights = outputs()
    assert float(make_loss(name, weights)(student, teacher)) == pytest.approx(by_hand(name), rel=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_the_first_position_does_not_count(name: str) -> None:
    student, teacher, weights = outputs()
    loss = make_loss(name, weights)
    before = loss(student, teacher)
    student[0] = 1e6
    assert torch.equal(loss(student, teacher), before)


@pytest.mark.parametrize("name", LOSSES)
def test_bf16_outputs_give_a_loss_in_fp32(name: str) -> None:
    student, teacher, weights = outputs()
    assert make_loss(name, weights)(student.bfloat16(), teacher.bfloat16()).dtype == torch.float32


def test_fisher_needs_weights() -> None:
    with pytest.raises(ValueError, match="channel weights"):
        make_loss("fisher")
