"""The vocabulary-parallel KL divergence and its gradient against the plain formula in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_spd.distill import kl
from megatron_spd.runtime.distributed import initialize
from tests.ranks import run_ranks

LENGTH, BATCH, HIDDEN, VOCABULARY = 7, 2, 6, 13


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    sizes = ((LENGTH, BATCH, HIDDEN), (LENGTH, BATCH, HIDDEN), (VOCABULARY, HIDDEN))
    student, teacher, table = (torch.randn(s, generator=generator, dtype=torch.float64) for s in sizes)
    return student, teacher, 3 * table


def on_ranks(ranks: int, rows: int, cuts: list[int] | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, its gradient times 2, and the loss without a gradient; ``rows`` positions at a time; ``cuts``: where
    the vocabulary is cut."""
    runtime = initialize(ranks)
    kl._ROWS = rows
    student, teacher, table = inputs()
    parts = table.tensor_split(cuts) if cuts else table.chunk(ranks)
    mine = parts[runtime.tp_rank]
    student.requires_grad_()
    loss = kl.vocabulary_parallel_kl(student, teacher, mine, runtime.tp_group)
    (2 * loss).backward()
    with torch.no_grad():
        again = kl.vocabulary_parallel_kl(student, teacher, mine, runtime.tp_group)
    assert student.grad is not None
    return loss.detach(), student.grad, again


@pytest.mark.parametrize("rows", [4, 256])
@pytest.mark.parametrize(
    ("ranks", "cuts"), [(1, None), (2, None), (3, None), (3, [7, 13])], ids=["1", "2", "3", "an empty rank"]
)
def test_loss_and_gradient(ranks: int, cuts: list[int] | None, rows: int) -> None:
    student, teacher, table = inputs()
    student.requires_grad_()
    log_q, log_p = ((x @ table.T).log_softmax(-1) for x in (student, teacher))
    wanted = F.kl_div(log_q, log_p, reduction="sum", log_target=True) / (LENGTH * BATCH)
    (2 * wanted).backward()
    assert float(wanted) > 0.1
    for loss, gradient, again in run_ranks(ranks, on_ranks, ranks, rows, cuts):
        assert loss.dtype == torch.float64
        assert torch.allclose(loss, wanted, rtol=1e-12)
        assert torch.equal(again, loss)
        assert torch.allclose(gradient, student.grad, rtol=1e-10, atol=1e-14)


def low_precision() -> tuple[Tensor, Tensor]:
    runtime = initialize(1)
    student, teacher, table = (t.bfloat16() for t in inputs())
    student.requires_grad_()
    loss = kl.vocabulary_parallel_kl(student, teacher, table, runtime.tp_group)
    loss.backward()
    assert student.grad is not None
    return loss.detach(), student.grad


def test_bf16_states_give_a_loss_in_fp32() -> None:
    student, teacher, table = (t.bfloat16().double() for t in inputs())
    student.requires_grad_()
    log_q, log_p = ((x @ table.T).log_softmax(-1) for x in (student, teacher))
    wanted = F.kl_div(log_q, log_p, reduction="sum", log_target=True) / (LENGTH * BATCH)
    wanted.backward()
    loss, gradient = run_ranks(1, low_precision)[0]
    assert (loss.dtype, gradient.dtype) == (torch.float32, torch.bfloat16)
    assert float(loss) == pytest.approx(float(wanted), rel=1e-2)
    assert student.grad is not None
    assert (gradient - student.grad).norm() < 0.03 * student.grad.norm()
