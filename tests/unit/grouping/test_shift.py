"""Streamed means against plain ones in float64, and the rule by which tokens are left out of them."""

from __future__ import annotations

import pytest
import torch

from megatron_spd.grouping.shift import MASSIVE, MeanDifference, ordinary_tokens
from megatron_spd.runtime.distributed import Runtime

CPU = torch.device("cpu")


@pytest.mark.parametrize("offset", [0.0, 3e3, 1e6])
def test_equals_the_plain_mean_in_float64(runtime: Runtime, offset: float) -> None:
    """With an offset that dwarfs the differences: means taken one by one in float32 would lose them."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(5000, 6, generator=generator) + offset
    branch = torch.randn(3, 5000, 6, generator=generator) + offset
    wanted = (dense.double() - branch.double()).mean(1)
    streamed = MeanDifference(3, 6, CPU)
    for rows in torch.arange(5000).split(700):
        streamed.add(dense[rows], branch[:, rows])
    # Differences of the size of 1: their mean is known to rounding of the float32 result alone.
    torch.testing.assert_close(streamed.mean(runtime).double(), wanted, rtol=1e-6, atol=1e-8)
    if offset == 1e6:
        apart = dense.mean(0) - branch.mean(1)
        assert (apart - wanted).abs().max() > 1e-3


@pytest.mark.parametrize("size", [1, 7, 64, 100])
def test_streaming_in_any_pieces_is_the_same(runtime: Runtime, size: int) -> None:
    generator = torch.Generator().manual_seed(1)
    dense, branch = torch.randn(100, 4, generator=generator), torch.randn(2, 100, 4, generator=generator)
    streamed = MeanDifference(2, 4, CPU)
    for rows in torch.arange(100).split(size):
        streamed.add(dense[rows], branch[:, rows])
    torch.testing.assert_close(streamed.mean(runtime), (dense - branch).mean(1), rtol=1e-6, atol=1e-7)
    # Reading it does not change it.
    assert torch.equal(streamed.mean(runtime), streamed.mean(runtime))


def test_no_tokens_no_shift(runtime: Runtime) -> None:
    assert torch.equal(MeanDifference(2, 3, CPU).mean(runtime), torch.zeros(2, 3))


def test_first_positions_and_massive_tokens_are_left_out_and_no_others() -> None:
    x = torch.zeros(9, 2, 4)
    x[..., 0] = 1.0
    x[0, 0] *= 0.5  # a first position of no particular length
    x[0, 1] *= 1e6  # one with massive activations, which must not move the median
    x[4, 0] *= 0.99 * MASSIVE
    x[5, 1] *= 1.01 * MASSIVE
    x[7, 0] *= 300.0
    x[8, 1] *= 0.0
    wanted = torch.ones(9, 2, dtype=torch.bool)
    wanted[0] = wanted[5, 1] = wanted[7, 0] = False
    assert torch.equal(ordinary_tokens(x), wanted)


def test_what_is_ordinary_does_not_depend_on_the_other_sequences() -> None:
    """Else the number of ranks and the micro-batches would decide which tokens count."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(12, 3, 8, generator=generator) * torch.tensor([0.01, 1.0, 30.0])[:, None]
    x[3] *= 20.0
    together = ordinary_tokens(x)
    assert torch.equal(together, torch.cat([ordinary_tokens(one) for one in x.split(1, 1)], 1))
    assert torch.equal(together.sum(0), torch.tensor([10, 10, 10]))


def test_half_precision_does_not_overflow() -> None:
    x = torch.full((4, 1, 4096), 3e4, dtype=torch.float16)
    assert torch.equal(ordinary_tokens(x)[:, 0], torch.tensor([False, True, True, True]))
