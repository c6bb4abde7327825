"""The sync-point rule (``layers/block.py``) on top of one of vLLM's decoder layers.

State between sublayers: the synced residual X [T, h] (T tokens) and, while points are dropped, the pending sums of the
rank's B = G / M branches, P [T, B * h]. For a sublayer with output bias b, optional shift c_g (else 0) and optional
branch norm w_g, b_g (else 1 and 0):

    z_g = norm(X + P_g + c_g) * w_g + b_g;   P_g += sublayer_g(z_g);   X += b
    if the sync point after it is kept:   X += all_reduce(sum of P_g);   P = 0

Where M / G > 1 ranks share a branch (B = 1), a sublayer's output is summed among them at a dropped point; at a kept
one the first of them gives P_g to the all-reduce over all ranks (``comm/branches.py`` says why that is exact).

Between layers the two travel as vLLM's ``hidden_states`` and ``residual``: after a kept point hidden states are what
was reduced, not yet added to X (the next norm adds it, as in every vLLM model); after a dropped MLP point they are P.
All that decides what is computed is known when the layer is built: forward holds no branch on data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

from megatron_spd.plan import SPDPlan, branches_of_rank
from megatron_spd.serving.vllm.collective import all_reduce_of, branch_sum
from megatron_spd.serving.vllm.linear import BranchInputMethod, BranchOutputMethod


@dataclass(frozen=True)
class Parts:
    """Names in a family's decoder layer: ``module``, which gets the vectors of a sublayer; the ``norm`` in front of
    it; its two linears, by the names on the way to them."""

    module: str
    norm: str
    column: tuple[str, ...]
    row: tuple[str, ...]


@dataclass(frozen=True)
class Step:
    """One sublayer under the rule. ``pending``: there is a P when it starts; ``shift``, ``branch_norm``: it has these
    vectors; ``all_reduce``: of the sync point after it, None where that is dropped."""

    parts: Parts
    pending: bool
    shift: bool
    branch_norm: bool
    all_reduce: Callable[[Tensor], Tensor] | None

    @property
    def plain_input(self) -> bool:
        """All branches get the same input."""
        return not (self.pending or self.shift or self.branch_norm)


class SyncPointRule(nn.Module):
    """Mixed in front of a decoder layer of vLLM's whose forward takes and gives hidden states and residual."""

    #: For a family whose layers have other names.
    ATTENTION = Parts("self_attn", "input_layernorm", ("self_attn", "qkv_proj"), ("self_attn", "o_proj"))
    MLP = Parts("mlp", "post_attention_layernorm", ("mlp", "gate_up_proj"), ("mlp", "down_proj"))

    self_attn: Any
    mlp: Any
    branches: int
    #: For M > G: the sum over the ranks of the branch, and whether this is not the first of them.
    branch_sum: Callable[[Tensor], Tensor] | None
    follows: bool
    attention_step: Step
    mlp_step: Step

    def follow(self, plan: SPDPlan, block: int) -> None:
        """Make the layer compute block ``block`` of ``plan`` on this rank.

        Its row-parallel linears then give partial sums, and the block's branch vectors are parameters [B, h], loaded
        from the rank's rows of the export's [G, h].
        """
        schedule = plan.block_schedule(block)
        ranks = get_tensor_model_parallel_world_size()
        self.branches = max(1, plan.branches // ranks)
        self.branch_sum = branch_sum(plan.branches)
        self.follows = get_tensor_model_parallel_rank() % max(1, ranks // plan.branches) > 0
        self.attention_step = Step(
            self.ATTENTION,
            schedule.pending,
            schedule.attention_shift,
            schedule.attention_norm,
            None if schedule.drop_attention else all_reduce_of(schedule.attention_collective),
        )
        self.mlp_step = Step(
            self.MLP,
            schedule.drop_attention,
            schedule.mlp_shift,
            schedule.mlp_norm,
            None if schedule.drop_mlp else all_reduce_of(schedule.mlp_collective),
        )
        for step in self.attention_step, self.mlp_step:
            self._split(step)
            self._add_vectors(step)

    def _split(self, step: Step) -> None:
        """Set the step's linears to give partial sums, by branch where branches differ."""
        column, row = map(self._part, (step.parts.column, step.parts.row))
        row.reduce_results = False
        row.skip_bias_add = True
        if self.branches > 1 and not step.plain_input:
            column.quant_method = BranchInputMethod(self.branches)
        if self.branches > 1 and step.all_reduce is None:
            row.quant_method = BranchOutputMethod(self.branches)

    def _add_vectors(self, step: Step) -> None:
        """Give the step its shift and branch norm."""
        module = getattr(self, step.parts.module)
        size = (self.branches, getattr(self, step.parts.norm).weight.shape[-1])
        if step.shift:
            module.spd_shift = _branch_vectors(torch.zeros(size))
        if step.branch_norm:
            module.spd_norm_weight = _branch_vectors(torch.ones(size))
            module.spd_norm_bias = _branch_vectors(torch.zeros(size))

    def forward(
        self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None, **_: None
    ) -> tuple[Tensor, Tensor]:
        """``positions`` [T], ``hidden_states`` [T, h], or P [T, B * h] behind a dropped MLP point, and ``residual`` X
        [T, h], None in front of the first block -> the last two after the block. What else vLLM's model hands its
        layers (Mistral's speech models have a condition) is None in a text model."""

        def attention(z: Tensor) -> Tensor:
            return self.self_attn(positions=positions, hidden_states=z)

        hidden_states, residual = self._advance(self.attention_step, attention, hidden_states, residual)
        return self._advance(self.mlp_step, self._run_mlp, hidden_states, residual)

    def _run_mlp(self, z: Tensor) -> Tensor:
        return self.mlp(z)

    def _advance(
        self,
        step: Step,
        sublayer: Callable[[Tensor], Tensor],
        hidden_states: Tensor,
        residual: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """One step of the rule: hidden states and residual -> the same two."""
        if step.plain_input and residual is not None:
            z, x = self._add_and_norm(getattr(self, step.parts.norm), hidden_states, residual)
        else:
            x = hidden_states if residual is None else residual
            if not step.pending and residual is not None:
                x = x + hidden_states
            z = self._branch_input(step, x, hidden_states if step.pending else None)
        output = sublayer(z)
        if step.all_reduce is None and self.branch_sum is not None:
            output = self.branch_sum(output)
        if step.pending and not (step.all_reduce is not None and self.follows):
            output = self._add_pending(output, hidden_states)
        if step.all_reduce is not None:
            output = step.all_reduce(output)
        # Experts have none.
        bias = getattr(self._part(step.parts.row), "bias", None)
        return output, x if bias is None else x + bias

    def _part(self, names: tuple[str, ...]) -> Any:
        """What is found by ``names``, one in the other."""
        found: Any = self
        for name in names:
            found = getattr(found, name)
        return found

    def _add_and_norm(self, norm: nn.Module, reduced: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """norm(X) and X [T, h] from what the last point ``reduced`` and the residual. vLLM's fused kernel may overwrite
        both."""
        return norm(reduced, residual)

    def _add_pending(self, output: Tensor, pending: Tensor) -> Tensor:
        """P [T, B * h] added to a sublayer's output: branch by branch, or summed where the output [T, h] is a sum."""
        if pending.shape[-1] != output.shape[-1]:
            pending = pending.unflatten(-1, (self.branches, -1)).sum(-2)
        return pending + output

    def _branch_input(self, step: Step, x: Tensor, pending: Tensor | None) -> Tensor:
        """norm(X + P_g + c_g) * w_g + b_g: [T, h] where all branches see the same, else [T, B * h]."""
        module, norm = getattr(self, step.parts.module), getattr(self, step.parts.norm)
        z = x.unsqueeze(-2)
        if pending is not None:
            z = z + pending.unflatten(-1, (self.branches, -1))
        if step.shift:
            z = z + module.spd_shift
        z = norm(z.flatten(0, 1)).view_as(z)
        if step.branch_norm:
            z = torch.addcmul(module.spd_norm_bias, z, module.spd_norm_weight)
        return z.flatten(-2)


class OneTensorRule(SyncPointRule):
    """For OPT's decoder layer, whose forward takes and gives one tensor: X [T, h], and behind a dropped MLP point X and
    P, one after the other, [T, (1 + B) * h]. Its MLP has no module of its own, and its norm adds nothing."""

    ATTENTION = Parts(
        "self_attn", "self_attn_layer_norm", ("self_attn", "qkv_proj"), ("self_attn", "out_proj")
    )
    MLP = Parts("mlp", "final_layer_norm", ("fc1",), ("fc2",))

    embed_dim: int
    fc1: Any
    activation_fn: Any
    fc2: Any

    def follow(self, plan: SPDPlan, block: int) -> None:
        """As :meth:`SyncPointRule.follow`."""
        self.mlp = nn.Module()  # for the vectors
        super().follow(plan, block)

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        """X, or X and P, [T, h] or [T, (1 + B) * h] -> the same."""
        residual = None
        if self.attention_step.pending:
            residual, hidden_states = hidden_states.tensor_split([self.embed_dim], -1)

        def mlp(z: Tensor) -> Tensor:
            return self.fc2(self.activation_fn(self.fc1(z)[0]))[0]

        hidden_states, residual = self._advance(self.attention_step, self.self_attn, hidden_states, residual)
        hidden_states, residual = self._advance(self.mlp_step, mlp, hidden_states, residual)
        if self.mlp_step.all_reduce is None:
            return torch.cat([residual, hidden_states], -1)
        return residual + hidden_states

    def _add_and_norm(self, norm: nn.Module, reduced: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        x = residual + reduced
        return norm(x), x


def _branch_vectors(values: Tensor) -> nn.Parameter:
    """A parameter [B, h] that vLLM's loader fills with the rank's rows of an export's [G, h]."""
    vectors = nn.Parameter(values, requires_grad=False)
    vectors.weight_loader = _load_own_branches  # type: ignore[attr-defined]
    return vectors


def _load_own_branches(vectors: Tensor, loaded: Tensor) -> None:
    """``vectors`` [B, h] of this rank from those of all branches, ``loaded`` [G, h]."""
    rank, ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    vectors.data.copy_(loaded[branches_of_rank(len(loaded), rank, ranks)])
