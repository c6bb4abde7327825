"""Sequence parallelism: the layer against the plain float64 formula, and one gather and one reduce-scatter per kept
point and direction."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_spd.runtime.distributed import initialize
from tests.distributed.block_cases import Case, build_case, forward, inputs
from tests.distributed.test_block import SCHEDULES, check
from tests.ranks import run_ranks

S = 12


def case_of(branches: int, dropped: tuple[int, ...], **settings: object) -> Case:
    return dataclasses.replace(Case(branches, 3, dropped, sequence_parallel=True, length=S), **settings)


@pytest.mark.parametrize("dropped", SCHEDULES.values(), ids=SCHEDULES.keys())
@pytest.mark.parametrize(("branches", "ranks"), [(4, 2), (3, 3)])
def test_every_kind_of_schedule(dropped: tuple[int, ...], branches: int, ranks: int) -> None:
    check(case_of(branches, dropped, biases=True), ranks)


VARIANTS = {
    "no biases": {},
    "shifts and branch norms": {"shifts": (1, 2, 3), "norms": (0, 2, 3), "biases": True},
    "grouped queries": {"kv_groups": 6},
    "plain mlp": {"gated": False, "biases": True},
    "recompute": {"recompute": True, "biases": True, "shifts": (2,)},
    "selective recompute": {"overrides": {"recompute_granularity": "selective"}},
    # Only where the SPD layer computes all blocks: a stock one draws other masks on every rank.
    "dropout": {"dropout": 0.3, "biases": True},
    "dropout and recompute": {"dropout": 0.3, "recompute": True, "biases": True},
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize(("branches", "ranks"), [(6, 2)])
def test_every_variant(variant: dict, branches: int, ranks: int) -> None:
    check(case_of(branches, (0, 1, 2, 4), **variant), ranks)


class Collectives(TorchDispatchMode):
    """The collectives inside the context: (operator of PyTorch's, bytes of what it writes). Megatron-core keeps
    references to the functions of torch.distributed, so that replacing those shows nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            written = args[0] if isinstance(args[0], Tensor) else args[0][0]
            self.calls.append((func.__name__.split(".")[0], written.nbytes))
        return func(*args, **(kwargs or {}))


def collectives(case: Case, ranks: int) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    runtime = initialize(ranks)
    unit = build_case(case, runtime)
    x, up = inputs(case, runtime)
    with Collectives() as forwards:
        out = forward(unit, x, case)
    with Collectives() as backwards:
        out.backward(up)
    return forwards.calls, backwards.calls


@pytest.mark.parametrize("dropped", [(0, 2, 4), (0, 1, 2, 3), (0, 1, 2, 3, 4), (0, 3, 4)])
def test_one_gather_and_one_reduce_scatter_per_kept_point(dropped: tuple[int, ...]) -> None:
    """All blocks of these schedules are SPD blocks."""
    case = case_of(2, dropped, biases=True, shifts=(1,), norms=(2,))
    kept = case.plan().collectives_per_forward()
    whole = S * 2 * case.hidden * 4
    forwards, backwards = run_ranks(2, collectives, case, 2)[0]
    assert forwards == [("_allgather_base_", whole), ("_reduce_scatter_base_", whole // 2)] * kept
    activations = [call for call in backwards if call[0] != "allreduce_"]
    assert activations == forwards
    # Norms and output biases, whose gradients no Megatron-core optimizer sums here.
    assert [size for name, size in backwards if name == "allreduce_"] == [case.hidden * 4] * (4 * 3)
