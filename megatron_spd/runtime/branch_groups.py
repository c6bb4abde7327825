"""The process groups of ranks that share a branch (method section 8, M > G).

The M tensor-parallel ranks form G groups of M / G ranks that follow each other, so that a branch sits in a node
wherever its ranks fit into one.
"""

from __future__ import annotations

import os

import torch.distributed as dist

from megatron_spd.errors import UserError

#: Groups by the number of their ranks. Filled when a layer first asks, emptied by ``shutdown``.
_groups: dict[int, dist.ProcessGroup] = {}

#: Where launchers say how many ranks a node has: torchrun, DeepSpeed.
_RANKS_PER_NODE = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")


def branch_process_group(
    branches: int, tp_group: dist.ProcessGroup, ranks_per_node: int | None = None
) -> dist.ProcessGroup | None:
    """The ranks of ``tp_group`` that compute the same one of G = ``branches`` as this rank; None for M <= G, where a
    rank has whole branches of its own.

    The first call for a size is a collective of all ranks of the world; later ones are answered from memory.
    ``ranks_per_node``: default what the launcher says. Raises UserError if G does not divide M, if the ranks
    of ``tp_group`` do not follow each other, or if a group would straddle nodes that it does not fill.
    """
    ranks = tp_group.size()
    if ranks <= branches:
        return None
    if ranks % branches:
        raise UserError(f"G = {branches} branches do not divide M = {ranks} tensor-parallel ranks")
    size = ranks // branches
    members = dist.get_process_group_ranks(tp_group)
    if members != list(range(members[0], members[0] + ranks)) or members[0] % ranks:
        raise UserError(
            f"the tensor-parallel ranks are {members}; for M > G they must follow each other (tensor parallelism "
            "first in Megatron-core's order of ranks)"
        )
    _check_nodes(size, branches, ranks, ranks_per_node or _launched_ranks_per_node())
    if size == ranks:
        return tp_group
    if size not in _groups:
        _groups[size], _ = dist.new_subgroups(size)
    return _groups[size]


def forget_branch_groups() -> None:
    """Empty the memory of groups; the caller destroys them."""
    _groups.clear()


def _check_nodes(size: int, branches: int, ranks: int, ranks_per_node: int | None) -> None:
    """Raise UserError if groups of ``size`` ranks in a row neither share nor fill nodes."""
    if ranks_per_node and size % ranks_per_node and ranks_per_node % size:
        raise UserError(
            f"M = {ranks} ranks for G = {branches} branches make groups of {size}, which straddle nodes of "
            f"{ranks_per_node} ranks; choose M so that M / G divides {ranks_per_node} or is a multiple of it"
        )


def _launched_ranks_per_node() -> int | None:
    for name in _RANKS_PER_NODE:
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name]) or None
    return None
