"""What crosses ranks: exactly one all-reduce per kept sync point and direction, and the small sums of
replicated parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_spd.comm.lowbit import GATHER
from megatron_spd.runtime.distributed import initialize
from tests.distributed.block_cases import Case, build_case
from tests.ranks import run_ranks

ALL = (
    "all_reduce",
    "all_gather",
    GATHER,
    "reduce_scatter_tensor",
    "broadcast",
    "all_to_all_single",
)
S, B, H = 7, 2, 16
ACTIVATION_BYTES = S * B * H * 4


class Counter:
    """Records (name, bytes) of every collective while active; ``sizes``: the number of ranks that each was among."""

    def __enter__(self) -> list[tuple[str, int]]:
        self.calls: list[tuple[str, int]] = []
        self.sizes: list[int] = []
        self.originals = {name: getattr(dist, name) for name in ALL}
        for name, function in self.originals.items():
            setattr(dist, name, self._wrap(name, function))
        return self.calls

    def __exit__(self, *_: Any) -> None:
        for name, function in self.originals.items():
            setattr(dist, name, function)

    def _wrap(self, name: str, function: Any) -> Any:
        def wrapped(tensor: Any, *args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, tensor.numel() * tensor.element_size()))
            self.sizes.append(dist.get_world_size(kwargs.get("group")))
            return function(tensor, *args, **kwargs)

        return wrapped


def count_collectives(case: Case, ranks: int) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    runtime = initialize(ranks)
    unit = build_case(case, runtime)
    x, up = (t.float() for t in case.data())
    x.requires_grad_()
    with Counter() as forward:
        out = unit(x)
    with Counter() as backward:
        out.backward(up)
    return forward, backward


@pytest.mark.parametrize(
    "dropped", [(), (0,), (0, 2, 4), (1,), (1, 3), (0, 1, 2, 3), (0, 1, 2, 3, 4), (2, 3)]
)
@pytest.mark.parametrize(("branches", "ranks"), [(2, 2), (3, 3), (4, 2)])
@pytest.mark.parametrize("biases", [False, True])
def test_one_all_reduce_per_kept_point(
    dropped: tuple[int, ...], branches: int, ranks: int, biases: bool
) -> None:
    after = tuple(p + 1 for p in dropped)
    # Shifts and branch norms belong to a rank: they add no collective.
    case = Case(branches, 3, dropped, biases=biases, shifts=after, norms=after)
    plan = case.plan()
    kept = plan.collectives_per_forward()
    forward, backward = run_ranks(ranks, count_collectives, case, ranks)[0]
    assert forward == [("all_reduce", ACTIVATION_BYTES)] * kept

    assert {name for name, _ in backward} <= {"all_reduce"}
    activations = [size for _, size in backward if size == ACTIVATION_BYTES]
    assert len(activations) == kept
    # One coalesced sum per SPD block of what is replicated but used differently: two norms, and the biases of
    # dropped points.
    expected = []
    for i in range(3):
        schedule = plan.block_schedule(i)
        if not schedule.is_stock:
            vectors = 2 + biases * (schedule.drop_attention + schedule.drop_mlp)
            expected.append(vectors * H * 4)
    assert sorted(size for _, size in backward if size != ACTIVATION_BYTES) == sorted(expected)


def count_inference(case: Case, ranks: int) -> list[tuple[str, int]]:
    unit = build_case(case, initialize(ranks)).eval()
    with torch.no_grad(), Counter() as forward:
        unit(case.data()[0].float())
    return forward


def test_inference_has_no_other_collectives() -> None:
    case = Case(3, 3, (0, 1, 4), norms=(1, 2))
    assert run_ranks(3, count_inference, case, 3)[1] == [("all_reduce", ACTIVATION_BYTES)] * 3


def count_by_group(case: Case, ranks: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(bytes, ranks) of every all-reduce of one forward and one backward pass."""
    unit = build_case(case, initialize(ranks))
    x, up = (t.float() for t in case.data())
    counters = Counter(), Counter()
    with counters[0]:
        out = unit(x.requires_grad_())
    with counters[1]:
        out.backward(up)
    assert {name for counter in counters for name, _ in counter.calls} == {"all_reduce"}
    forward, backward = (
        [(size, among) for (_, size), among in zip(counter.calls, counter.sizes, strict=True)]
        for counter in counters
    )
    return forward, backward


@pytest.mark.parametrize("dropped", [(), (0, 2, 4), (1, 3), (0, 1, 2, 3, 4), (2, 3)])
@pytest.mark.parametrize("extras", [False, True], ids=["plain", "biases, shifts, branch norms"])
def test_a_dropped_point_is_summed_inside_its_branch_alone(dropped: tuple[int, ...], extras: bool) -> None:
    branches, ranks = 2, 4
    after = tuple(p + 1 for p in dropped) if extras else ()
    case = Case(branches, 3, dropped, biases=extras, shifts=after, norms=after)
    forward, backward = run_ranks(ranks, count_by_group, case, ranks)[3]
    among = [ranks // branches if p in dropped else ranks for p in range(6)]
    assert forward == [(ACTIVATION_BYTES, size) for size in among]
    activations = [call for call in backward if call[0] == ACTIVATION_BYTES]
    assert sorted(activations) == sorted(forward)

    expected = []
    for i in range(3):
        schedule = case.plan().block_schedule(i)
        if not schedule.is_stock:
            expected.append((2 + extras * (schedule.drop_attention + schedule.drop_mlp), ranks))
        own = sum(p in after for p in (2 * i, 2 * i + 1))
        if own:
            # A shift and both vectors of a branch norm, for every dropped point in front.
            expected.append((3 * own, ranks // branches))
    vectors = [call for call in backward if call[0] != ACTIVATION_BYTES]
    assert sorted(vectors) == sorted((count * H * 4, size) for count, size in expected)
