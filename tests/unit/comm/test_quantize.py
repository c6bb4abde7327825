"""Quantisation: every value comes back within half a step, and what is no number stays none."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_spd.collective import GROUPS, WIDTHS, CollectiveFormat, Quantisation
from megatron_spd.comm.lowbit import simulate_lowbit
from megatron_spd.comm.quantize import dequantise, dequantise_sum, quantise
from tests.quantisation_bounds import error_bound, sum_bound

FORMATS = st.builds(Quantisation, st.sampled_from(WIDTHS), st.sampled_from(GROUPS))
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def random_values(rows: int, n: int, seed: int, spread: float, offset: float, dtype: torch.dtype) -> Tensor:
    """Normal values whose size varies by ``spread`` powers of e from one to the next, around ``offset``."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.exp(spread * torch.randn(rows, n, generator=generator))
    values = torch.randn(rows, n, generator=generator) * sizes + offset
    greatest = torch.finfo(dtype).max
    return values.clamp(-greatest, greatest).to(dtype)


def there_and_back(x: Tensor, fmt: Quantisation) -> Tensor:
    wire = quantise(x, fmt)
    assert wire.shape == (len(x), fmt.wire_bytes(x.shape[1]))
    assert wire.dtype == torch.uint8
    return dequantise(wire, x.shape[1], fmt)


@settings(deadline=None, max_examples=60)
@given(
    fmt=FORMATS,
    rows=st.integers(1, 3),
    groups=st.integers(1, 5),
    seed=st.integers(0, 1000),
    spread=st.sampled_from([0.0, 1.0, 3.0]),
    offset=st.sampled_from([0.0, -7.0, 3000.0]),
    dtype=DTYPES,
)
def test_every_value_comes_back_within_half_a_step(
    fmt: Quantisation, rows: int, groups: int, seed: int, spread: float, offset: float, dtype: torch.dtype
) -> None:
    x = random_values(rows, groups * fmt.group, seed, spread, offset, dtype)
    error = (there_and_back(x, fmt).double() - x.double()).abs()
    assert bool((error <= error_bound(x, fmt)).all())


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_step_is_no_larger_than_the_width_asks(bits: int) -> None:
    """The bound itself is tight: all codes are used, and a width more halves the error."""
    fmt = Quantisation(bits, 256)
    x = torch.linspace(-1, 1, 1024).view(1, -1)
    assert len(there_and_back(x, fmt)[0, :256].unique()) >= min(1 << bits, 128)
    # A group is a quarter of the range from -1 to 1.
    assert float(error_bound(x, fmt).median()) < 1.1 * (0.25 / fmt.levels)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -2.5, 1e-3, 1e30, -1e30, 1e-30, 1e-44, 65504.0])
def test_constant_groups(bits: int, value: float) -> None:
    fmt = Quantisation(bits, 16)
    x = torch.full((1, 32), value)
    error = (there_and_back(x, fmt).double() - x.double()).abs()
    assert bool((error <= error_bound(x, fmt)).all())
    if value in (0.0, 1.0, -2.5):  # numbers of bfloat16
        assert torch.equal(there_and_back(x, fmt), x)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("scale", [1e37, 1e20, 1e-20, 1e-38, 1e-42])
def test_huge_and_tiny_values(bits: int, scale: float) -> None:
    fmt = Quantisation(bits, 32)
    x = random_values(2, 64, bits, 1.0, 0.0, torch.float32).clamp(-8, 8) * scale
    error = (there_and_back(x, fmt).double() - x.double()).abs()
    assert bool((error <= error_bound(x, fmt)).all())


@pytest.mark.parametrize("bits", WIDTHS)
def test_spikes_leave_the_others_their_range(bits: int) -> None:
    x = random_values(1, 32, 0, 0.0, 0.0, torch.float32)
    x[0, 5], x[0, 20] = 1000.0, -3000.0
    back = there_and_back(x, Quantisation(bits, 32))
    assert back[0, [5, 20]].tolist() == pytest.approx([1000.0, -3000.0], rel=2**-8)
    rest = [i for i in range(32) if i not in (5, 20)]
    # Half a step of a range below 6; with the spikes it would be 4000..
    assert float((back - x)[0, rest].abs().max()) < 3.0 / ((1 << bits) - 1)


#: Numbers that are none, by their bits: NaN of either sign with least and greatest payload, infinities.
NO_NUMBERS = [0x7FC00000, 0xFFC00000, 0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0xFF800001, 0x7F800000, 0xFF800000]


def from_bits(bits: int) -> float:
    return (
        torch.tensor(bits - (1 << 32) * (bits >> 31), dtype=torch.int64).to(torch.int32).view(torch.float32)
    )


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("pattern", NO_NUMBERS, ids=hex)
def test_what_is_no_number_stays_none(bits: int, pattern: int) -> None:
    fmt = Quantisation(bits, 16)
    for place in (0, 7, 15):
        x = random_values(1, 48, place, 1.0, 0.0, torch.float32)
        x[0, 16 + place] = from_bits(pattern)
        back = there_and_back(x, fmt)
        assert not bool(back[0, 16:32].isfinite().any())
        # Other groups do not suffer.
        assert bool(back[0, :16].isfinite().all() & back[0, 32:].isfinite().all())


@pytest.mark.parametrize("text", ["int8", "int4:g16", "int3:g16", "int2:g64"])
def test_a_group_of_infinities_or_beyond_the_range_of_float32(text: str) -> None:
    fmt = CollectiveFormat.parse(text).scatter
    for low, high in [(torch.inf, torch.inf), (-torch.inf, torch.inf), (-3e38, 3e38), (torch.nan, torch.nan)]:
        x = torch.full((1, fmt.group), low)
        x[0, ::2] = high
        assert not bool(there_and_back(x, fmt).isfinite().any())


@settings(deadline=None, max_examples=40)
@given(
    fmt=st.builds(CollectiveFormat, FORMATS, FORMATS),
    ranks=st.integers(2, 5),
    shape=st.lists(st.integers(1, 13), min_size=0, max_size=3),
    seed=st.integers(0, 1000),
    dtype=DTYPES,
)
def test_the_simulated_sum_is_within_its_bound(
    fmt: CollectiveFormat, ranks: int, shape: list[int], seed: int, dtype: torch.dtype
) -> None:
    count = int(torch.Size(shape).numel())
    partials = random_values(ranks, count, seed, 1.0, 0.5, dtype)
    got = simulate_lowbit(partials.view(ranks, *shape), fmt)
    assert (got.shape, got.dtype) == (torch.Size(shape), dtype)
    bound = sum_bound(partials, fmt) + partials.double().abs().sum(0) * torch.finfo(dtype).eps * 2
    assert bool(((got.flatten().double() - partials.double().sum(0)).abs() <= bound).all())


def test_the_simulated_sum_does_not_depend_on_what_stands_in_other_groups() -> None:
    fmt = CollectiveFormat.parse("int4/int8:g32")
    partials = random_values(3, 200, 0, 1.0, 0.0, torch.float32)
    changed = partials.clone()
    changed[:, 32:64] = torch.nan
    got, other = simulate_lowbit(partials, fmt), simulate_lowbit(changed, fmt)
    assert bool(other[32:64].isnan().all())
    assert torch.equal(torch.cat([got[:32], got[64:]]), torch.cat([other[:32], other[64:]]))


def test_blocks_of_the_cache_do_not_show() -> None:
    """More values than are worked on at a time give the same bytes group by group."""
    fmt = Quantisation(5, 64)
    x = random_values(2, 3 * (1 << 16), 0, 1.0, 0.0, torch.float32)
    wire = quantise(x, fmt)
    whole = dequantise(wire, x.shape[1], fmt)
    piece = slice(1 << 16, (1 << 16) + 640)
    assert torch.equal(whole[:, piece], there_and_back(x[:, piece].contiguous(), fmt))
    assert torch.equal(dequantise_sum(wire, x.shape[1], fmt), whole[0] + whole[1])


def test_values_that_do_not_lie_in_a_row() -> None:
    fmt = Quantisation(4, 32)
    x = random_values(64, 2, 0, 1.0, 0.0, torch.float32)
    assert torch.equal(quantise(x.T, fmt), quantise(x.T.contiguous(), fmt))


def test_padding_counts_as_zeros() -> None:
    fmt = CollectiveFormat.parse("int8:g32")
    partials = random_values(2, 40, 0, 1.0, 0.0, torch.float32)
    assert torch.equal(simulate_lowbit(partials, fmt), simulate_lowbit(F.pad(partials, (0, 24)), fmt)[:40])
