"""The process groups of ranks that share a branch: which ranks, made once, gone with the others."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron_spd.comm.branches import BranchShare
from megatron_spd.errors import UserError
from megatron_spd.runtime.branch_groups import branch_process_group
from megatron_spd.runtime.distributed import initialize
from tests.ranks import run_ranks


def members(branches: int, ranks: int) -> list[int] | None:
    """The ranks of the world that share this one's branch; None where each has its own."""
    group = branch_process_group(branches, initialize(ranks).tp_group)
    return None if group is None else dist.get_process_group_ranks(group)


@pytest.mark.parametrize(
    ("branches", "ranks", "wanted"),
    [
        (4, 4, [None] * 4),
        (2, 4, [[0, 1], [0, 1], [2, 3], [2, 3]]),
        (1, 4, [[0, 1, 2, 3]] * 4),
        # Two replicas.
        (1, 2, [[0, 1], [0, 1], [2, 3], [2, 3]]),
        (2, 2, [None] * 4),
    ],
)
def test_ranks_of_a_branch_follow_each_other(branches: int, ranks: int, wanted: list) -> None:
    assert run_ranks(4, members, branches, ranks) == wanted


def made_once_and_again() -> tuple[bool, bool, float]:
    group = initialize(4).tp_group
    first, second = (branch_process_group(2, group) for _ in range(2))
    initialize(2)  # another M: all groups are closed
    third = branch_process_group(2, initialize(4).tp_group)
    number = torch.ones(1)
    dist.all_reduce(number, group=third)
    return first is second, first is third, float(number)


def test_groups_are_made_once_and_again_after_they_were_closed() -> None:
    assert run_ranks(4, made_once_and_again) == [(True, False, 2.0)] * 4


def refused(branches: int, ranks_per_node: int | None) -> str:
    try:
        branch_process_group(branches, initialize(4).tp_group, ranks_per_node)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("branches", "ranks_per_node", "message"),
    [
        (3, None, "G = 3 branches do not divide M = 4"),
        (2, 3, "make groups of 2, which straddle nodes of 3 ranks; choose M so that M / G divides 3"),
        (2, 4, ""),
        (2, 1, ""),
    ],
)
def test_what_does_not_fit_is_refused(branches: int, ranks_per_node: int | None, message: str) -> None:
    for answer in run_ranks(4, refused, branches, ranks_per_node):
        assert (message in answer) if message else not answer


def test_a_share_of_a_branch_needs_its_group() -> None:
    assert BranchShare(4, 2, 1).mine == slice(2, 4)
    with pytest.raises(ValueError, match="M = 4, G = 2: a branch group is needed"):
        BranchShare(2, 4, 0)
