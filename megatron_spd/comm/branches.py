"""A rank and the branches (method section 8): whole ones of its own, or one that it shares with other ranks.

Where M > G the k = M / G ranks of a branch hold tensor-parallel parts of it, and each of them the branch's pending sum
P_g. What is sent is the least that keeps the rule exact:

- dropped point: the sublayer's partial outputs are summed inside the group, and P_g grows by the sum (:meth:`add_up`);
- kept point: the partial output of this last sublayer goes into the all-reduce over all M ranks unsummed, and P_g
  goes in once, by the group's first rank (:attr:`leads`).

So a dropped point costs one all-reduce inside the group and a kept one the all-reduce over all ranks, nothing else.

Backward, the gradient of P_g on each of the k ranks is a partial sum, like that of X: each rank has what its own
part of the next sublayers makes of it, and the first rank what comes back from the kept point as well. The gradient of
a partial output is the sum of these over the group, again one all-reduce per dropped point. Shifts and branch norms are
replicated inside the group and used by different parts: their gradients are summed inside it (:meth:`share`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from megatron_spd.comm.autograd import share_parameters, sum_within
from megatron_spd.plan import branches_of_rank


@dataclass(frozen=True)
class BranchShare:
    """What one of ``ranks`` = M computes of ``branches`` = G. ``group``: the ranks of its branch where M > G (see
    ``runtime/branch_groups.py``), else None."""

    branches: int
    ranks: int
    rank: int
    group: dist.ProcessGroup | None = None

    def __post_init__(self) -> None:
        if (self.ranks > self.branches) != (self.group is not None):
            raise ValueError(
                f"M = {self.ranks}, G = {self.branches}: a branch group is needed for M > G, and for it alone"
            )

    @property
    def mine(self) -> slice:
        """The branches of this rank: G / M, or one for M > G."""
        return branches_of_rank(self.branches, self.rank, self.ranks)

    @property
    def local(self) -> int:
        """B, their number."""
        return self.mine.stop - self.mine.start

    @property
    def copy(self) -> int:
        """The number of this rank among those of its branch, 0 .. k - 1."""
        return 0 if self.group is None else self.group.rank()

    @property
    def leads(self) -> bool:
        """Whether this rank answers for its branches in sums over all ranks."""
        return self.copy == 0

    def add_up(self, partial: Tensor) -> Tensor:
        """The output of the rank's branches at a dropped point, [B, s, b, h], from its ``partial`` one, which is
        consumed."""
        return partial if self.group is None else sum_within(partial, self.group)

    def share(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameters of the branch (by name) for use by this rank's part of it."""
        if self.group is None:
            return dict(vectors)
        return dict(zip(vectors, share_parameters(list(vectors.values()), self.group), strict=True))
