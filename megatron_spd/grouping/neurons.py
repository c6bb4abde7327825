"""Neuron grouping: what it costs to have an MLP neuron in a branch (method section 7).

MLP neurons may sit in any branch: permuting rows of gate and up and columns of down changes nothing in a
tensor-parallel block, and everything in an SPD block. Two costs, for the two ways in which a branch goes blind:

*Reading* (the MLP reads a branch's own input z_g instead of z): the error that neuron n makes at the block's output,

    read[n, g] = mean over tokens of (act_n(z) - act_n(z_g))^2 * |down_n|^2

*Writing* (the MLP's own sync point is dropped, so that only the heads of branch g see what is written in g before the
next sync): minus the energy that the next block's projections of branch g receive from neuron n,

    write[n, g] = - var(act_n) * |W_qkv,g diag(norm weight) down_n|^2

Both are energies, the first of the block's output, the second of the next attention's projections. Where both apply,
the second is brought to the unit of the first by ``exchange``, the energy of the attention's output error per energy of
its projections' error (measured, see ``calibrate.py``). ``assignment.py`` finds the best balanced assignment. Memory
does not depend on the number of tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_spd.comm.all_reduce import all_reduce
from megatron_spd.grouping.formulas import BlockFormulas
from megatron_spd.runtime.distributed import Runtime


class ReadingCost:
    """Streamed sums of (act(z) - act(z_g))^2 for every neuron in every branch."""

    def __init__(self, dense: BlockFormulas, branches: int) -> None:
        down = dense.weights["mlp.down_proj.weight"]
        self._dense = dense
        self._sizes = down.float().square().sum(0)
        self._sum = torch.zeros(branches, down.shape[1], dtype=torch.float64, device=down.device)
        self._count = torch.zeros(1, dtype=torch.float64, device=down.device)

    def add(self, z: Tensor, branch_z: Tensor) -> None:
        """Rows of tokens: ``z`` [n, h] dense, ``branch_z`` [G, n, h] what a neuron of branch g would read."""
        true = self._dense.activations(z[None])
        for g, own in enumerate(branch_z):
            difference = self._dense.activations(own[None]) - true
            self._sum[g] += difference.square().sum(0, dtype=torch.float64)
        self._count += z.shape[0]

    def cost(self, runtime: Runtime) -> Tensor:
        """read [n, G] over the tokens of all ranks, float64. A collective."""
        total = all_reduce(torch.cat([self._sum.flatten(), self._count]), runtime.world_group)
        mean = (total[:-1] / total[-1].clamp_min(1.0)).view_as(self._sum)
        return mean.T * self._sizes[:, None]


class WritingCost:
    """Streamed variance of the activations, and what each branch of the next block sees of them."""

    def __init__(self, dense: BlockFormulas, following: BlockFormulas, branches: int) -> None:
        self._seen = energy_seen(dense, following, branches)
        neurons = self._seen.shape[0]
        # Sum, sum of squares, count.
        self._sums = torch.zeros(2 * neurons + 1, dtype=torch.float64, device=self._seen.device)

    def add(self, activations: Tensor) -> None:
        """Rows of tokens: dense activations [n, ffn]."""
        n = self._seen.shape[0]
        self._sums[:n] += activations.sum(0, dtype=torch.float64)
        self._sums[n:-1] += activations.square().sum(0, dtype=torch.float64)
        self._sums[-1] += activations.shape[0]

    def cost(self, runtime: Runtime) -> Tensor:
        """write [n, G] over the tokens of all ranks, float64. A collective."""
        sums = all_reduce(self._sums.clone(), runtime.world_group)
        n = self._seen.shape[0]
        mean = sums[:n] / sums[-1].clamp_min(1.0)
        variance = sums[n:-1] / sums[-1].clamp_min(1.0) - mean.square()
        return -variance[:, None] * self._seen


def energy_seen(dense: BlockFormulas, following: BlockFormulas, branches: int) -> Tensor:
    """|W_qkv,g diag(norm weight) down_n|^2 [ffn, G], float64: how much of neuron n the next block's branch g reads."""
    down = dense.weights["mlp.down_proj.weight"]
    scaled = following.weights["input_layernorm.weight"][:, None] * down
    seen = torch.zeros(down.shape[1], branches, dtype=torch.float64, device=down.device)
    for name in ("q", "k", "v"):
        runs = following.weights[f"self_attn.{name}_proj.weight"].chunk(branches)
        seen += torch.stack([(w @ scaled).square().sum(0, dtype=torch.float64) for w in runs], 1)
    return seen
