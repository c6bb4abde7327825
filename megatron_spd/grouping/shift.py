"""Shift compensation: the mean of what a branch no longer sees, added to its input (method section 7).

    c_g = mean over tokens of (U - U_g)

with U the dense input of a sublayer and U_g = X + P_g what branch g sees of it. Means are streamed and summed over
data-parallel ranks. Left out are tokens with massive activations (:func:`ordinary_tokens`): a handful of them, hundreds
of times larger than all others, would be the mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_spd.comm.all_reduce import all_reduce
from megatron_spd.runtime.distributed import Runtime

#: A token is massive whose hidden state is this many times longer than its sequence's median one.
MASSIVE = 8.0


def ordinary_tokens(x: Tensor) -> Tensor:
    """Which tokens of hidden states ``x`` [s > 1, b, h] enter means and costs: bool [s, b].

    The rule: not the first position of a sequence (every model studied puts massive activations there), and not a
    token whose hidden state is more than :data:`MASSIVE` times as long as the median one of its sequence (which no
    other sequence of the batch can change).
    """
    length = x.float().norm(dim=-1)
    ordinary = length <= MASSIVE * length[1:].median(0).values
    ordinary[0] = False
    return ordinary


class MeanDifference:
    """Streamed mean over tokens of (dense input - branch input), in float64: [G, h]."""

    def __init__(self, branches: int, hidden: int, device: torch.device) -> None:
        self._sum = torch.zeros(branches, hidden, dtype=torch.float64, device=device)
        self._count = torch.zeros(1, dtype=torch.float64, device=device)

    def add(self, dense: Tensor, branch: Tensor) -> None:
        """Rows of tokens: ``dense`` [n, h], ``branch`` [G, n, h]."""
        self._sum += (dense - branch).sum(1, dtype=torch.float64)
        self._count += dense.shape[0]

    def mean(self, runtime: Runtime) -> Tensor:
        """c_g [G, h] in float32 over the tokens of all ranks; zero without tokens. A collective."""
        total = all_reduce(torch.cat([self._sum.flatten(), self._count]), runtime.world_group)
        return (total[:-1] / total[-1].clamp_min(1.0)).view_as(self._sum).float()
