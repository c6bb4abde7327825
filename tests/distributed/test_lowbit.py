"""The low-bit all-reduce on real ranks: the sum within its bound, the same bytes on all, and what it sends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_spd.collective import CollectiveFormat
from megatron_spd.comm.autograd import enter_segment, leave_segment, sum_low_bit
from megatron_spd.comm.lowbit import GATHER, PLAIN_BELOW, exchanged_bytes, lowbit_all_reduce, simulate_lowbit
from tests.distributed.test_collectives import Counter
from tests.quantisation_bounds import sum_bound
from tests.ranks import run_ranks

FORMATS = ["int8", "int6", "int5", "int4:g64", "int4/int8", "int3", "int2", "int8/int3:g8"]
SHAPES = [(), (1,), (129,), (7, 2, 16), (4, 1000)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def partials_of(ranks: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """What each rank holds [ranks, *shape]; the same on all ranks."""
    generator = torch.Generator().manual_seed(len(shape))
    return (torch.randn(ranks, *shape, generator=generator) * 3 + 0.2).to(dtype)


def sums(text: str) -> list[tuple[Tensor, bool]]:
    """The sum of every case on this rank, and whether the argument was left alone."""
    results = []
    for shape in SHAPES:
        for dtype in DTYPES:
            own = partials_of(dist.get_world_size(), shape, dtype)[dist.get_rank()]
            before = own.clone()
            got = lowbit_all_reduce(own, CollectiveFormat.parse(text), dist.group.WORLD, plain_below=0)
            results.append((got, torch.equal(own, before)))
    return results


@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_sums(text: str, ranks: int) -> None:
    fmt = CollectiveFormat.parse(text)
    by_rank = run_ranks(ranks, sums, text)
    cases = [(shape, dtype) for shape in SHAPES for dtype in DTYPES]
    for index, (shape, dtype) in enumerate(cases):
        results = [answers[index] for answers in by_rank]
        first = results[0][0]
        assert all(unchanged for _, unchanged in results)
        assert all(torch.equal(got, first) for got, _ in results), (shape, dtype)
        partials = partials_of(ranks, shape, dtype)
        simulated = simulate_lowbit(partials, fmt)
        assert (first.shape, first.dtype, first.is_contiguous()) == (shape, dtype, True)
        assert torch.equal(first, simulated), (shape, dtype)
        flat = partials.reshape(ranks, -1)
        bound = sum_bound(flat, fmt) + flat.double().abs().sum(0) * torch.finfo(dtype).eps * 2
        assert bool(((first.reshape(-1).double() - flat.double().sum(0)).abs() <= bound).all())


def not_in_a_row() -> tuple[bool, bool]:
    """A transposed and an expanded argument give what their contiguous copies give."""
    own = partials_of(dist.get_world_size(), (30, 40), torch.float32)[dist.get_rank()]
    fmt, group = CollectiveFormat.parse("int4"), dist.group.WORLD
    wide = own[:, :1].expand(30, 40)
    return tuple(
        torch.equal(
            lowbit_all_reduce(given, fmt, group, plain_below=0),
            lowbit_all_reduce(given.contiguous(), fmt, group, plain_below=0),
        )
        for given in (own.T, wide)
    )


def test_arguments_that_do_not_lie_in_a_row() -> None:
    assert run_ranks(3, not_in_a_row) == [(True, True)] * 3


def no_numbers() -> Tensor:
    own = torch.ones(1024)
    if dist.get_rank() == 1:
        own[5], own[700] = torch.nan, torch.inf
    return lowbit_all_reduce(own, CollectiveFormat.parse("int4/int8"), dist.group.WORLD, plain_below=0)


def test_what_is_no_number_on_one_rank_is_none_on_all() -> None:
    first, *others = run_ranks(3, no_numbers)
    assert not bool(first[[5, 700]].isfinite().any())
    # Groups of 128 in the second step; the rest are sums of ones.
    assert torch.equal(first[128:640], torch.full((512,), 3.0))
    for other in others:
        assert torch.equal(other.nan_to_num(), first.nan_to_num())


def counted(numel: int, text: str, **options: int) -> list[tuple[str, int]]:
    with Counter() as calls:
        lowbit_all_reduce(torch.ones(numel), CollectiveFormat.parse(text), dist.group.WORLD, **options)
    return calls


@pytest.mark.parametrize("text", ["int8", "int4/int8", "int2"])
def test_what_is_sent(text: str) -> None:
    fmt = CollectiveFormat.parse(text)
    chunk = fmt.chunk(20_000, 3)
    calls = run_ranks(3, counted, 20_000, text)[2]
    sizes = {"all_to_all_single": fmt.scatter, GATHER: fmt.gather}
    assert calls == [(name, 3 * step.wire_bytes(chunk)) for name, step in sizes.items()]
    # Of each of the two a rank keeps a third.
    assert exchanged_bytes(20_000, 3, fmt) == sum(size for _, size in calls) * 2 // 3
    full = 2 * 2 * 4 * 20_000 / 3
    assert exchanged_bytes(20_000, 3, fmt) / full == pytest.approx(fmt.bytes_per_value / 4, rel=0.05)


def test_a_small_message_goes_through_a_plain_all_reduce() -> None:
    numel = PLAIN_BELOW // 4 - 1
    assert run_ranks(3, counted, numel, "int8")[0] == [("all_reduce", 4 * numel)]
    assert len(run_ranks(3, counted, numel + 1, "int8")[0]) == 2
    assert len(run_ranks(3, counted, 1, "int8", plain_below=0)[0]) == 2


def alone() -> bool:
    own = torch.ones(5)
    return lowbit_all_reduce(own, CollectiveFormat.parse("int2"), dist.group.WORLD, plain_below=0) is own


def test_a_group_of_one_rank() -> None:
    assert run_ranks(1, alone) == [True]


def gradients(text: str | None) -> dict[str, Any]:
    """Gradients at the ends of a segment whose sum is low-bit (None: plain)."""
    group, rank = dist.group.WORLD, dist.get_rank()
    fmt = None if text is None else CollectiveFormat.parse(text)
    x = torch.linspace(-1, 1, 32768, requires_grad=True)
    inside = enter_segment(x, group)
    pending = inside * (rank + 1.0)
    out = leave_segment(inside, pending, group, fmt)
    (out * torch.arange(32768.0)).sum().backward()
    return {"out": out.detach(), "x": x.grad}


def test_the_gradient_is_that_of_the_plain_sum() -> None:
    for plain, low_bit in zip(run_ranks(3, gradients, None), run_ranks(3, gradients, "int4"), strict=True):
        assert torch.equal(plain["x"], low_bit["x"])
        assert 0 < float((plain["out"] - low_bit["out"]).abs().max()) < 0.1


def test_the_gradient_of_the_simulated_sum() -> None:
    partials = torch.randn(3, 5, 40, requires_grad=True)
    fmt = CollectiveFormat.parse("int4")
    up = torch.randn(5, 40)
    out = sum_low_bit(partials, fmt)
    out.backward(up)
    assert torch.equal(out, simulate_lowbit(partials.detach(), fmt))
    assert torch.equal(partials.grad, up.expand(3, 5, 40))
