"""Llama with dropped tensor-parallel sync points (Sync-Point Drop, "SPD"), all G branches on one device.

This file is shipped inside exported model folders: it needs torch and transformers and nothing else.

The rule. The state between sublayers is X, the synced residual, and P_g, branch g's pending partial sum. For each
sublayer (attention or MLP) with output bias b, optional shift c_g (else 0) and optional branch norm w_g, b_g (else 1
and 0):

    z_g = norm(X + P_g + c_g) * w_g + b_g;   P_g += sublayer_g(z_g);   X += b
    if the sync point after it is kept:   X += sum over g of P_g;   P_g = 0

Branch g holds the g-th of G equal contiguous parts of the key/value groups (with their query heads) and of the MLP
neurons. With every point kept this is the dense Llama, and blocks in which nothing is dropped, pending or different
for each branch are transformers' own. The others reuse its attention and MLP (RoPE, cache, attention kernels) and
change only their projections, which take and give tensors whose last axis holds the branches one after the other,
[b, s, G * h].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaMLP,
    LlamaModel,
    LlamaRMSNorm,
)

from .configuration_spd_llama import SPDLlamaConfig


class BranchInputLinear(nn.Linear):
    """A projection whose output rows are split over branches (q, k, v, gate, up).

    [b, s, in], the same input for all branches, or [b, s, G * in], one for each -> [b, s, out].
    """

    def __init__(self, like: nn.Linear, branches: int) -> None:
        super().__init__(like.in_features, like.out_features, bias=like.bias is not None)
        self.branches = branches

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] == self.in_features:
            return super().forward(x)
        x = x.unflatten(-1, (self.branches, self.in_features))
        weight = self.weight.unflatten(0, (self.branches, -1))
        out = torch.einsum("bsgi,goi->bsgo", x, weight).flatten(-2)
        return out if self.bias is None else out + self.bias


class BranchOutputLinear(nn.Linear):
    """A projection whose input columns are split over branches (o_proj, down_proj). Its bias belongs to X: not added.

    [b, s, in] -> [b, s, out], the sum over branches; if ``partial`` [b, s, G * out], each branch's own part.
    """

    def __init__(self, like: nn.Linear, branches: int, partial: bool) -> None:
        super().__init__(like.in_features, like.out_features, bias=like.bias is not None)
        self.branches = branches
        self.partial = partial

    def forward(self, x: Tensor) -> Tensor:
        if not self.partial:
            return nn.functional.linear(x, self.weight)
        x = x.unflatten(-1, (self.branches, -1))
        weight = self.weight.unflatten(1, (self.branches, -1))
        return torch.einsum("bsgi,ogi->bsgo", x, weight).flatten(-2)


class BranchVectors(nn.Module):
    """The vectors [G, h] at a sublayer's input, where the plan has them: shift c_g, norm weight w_g, norm bias b_g."""

    spd_shift: nn.Parameter | None
    spd_norm_weight: nn.Parameter | None
    spd_norm_bias: nn.Parameter | None

    def add_branch_vectors(self, config: SPDLlamaConfig, layer: int, sublayer: str) -> None:
        size = (config.branches, config.hidden_size)
        shift, norm = config.has_shift(layer, sublayer), config.has_norm(layer, sublayer)
        self.spd_shift = nn.Parameter(torch.zeros(size)) if shift else None
        self.spd_norm_weight = nn.Parameter(torch.ones(size)) if norm else None
        self.spd_norm_bias = nn.Parameter(torch.zeros(size)) if norm else None


class SPDLlamaAttention(LlamaAttention, BranchVectors):
    """transformers' attention over all heads, with projections by branch."""

    o_proj: BranchOutputLinear

    def __init__(self, config: SPDLlamaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(self, name, BranchInputLinear(getattr(self, name), config.branches))
        self.o_proj = BranchOutputLinear(self.o_proj, config.branches, config.is_dropped(2 * layer_idx))
        self.add_branch_vectors(config, layer_idx, "attention")


class SPDLlamaMLP(LlamaMLP, BranchVectors):
    """transformers' MLP over all neurons, with projections by branch."""

    down_proj: BranchOutputLinear

    def __init__(self, config: SPDLlamaConfig, layer_idx: int) -> None:
        super().__init__(config)
        for name in ("gate_proj", "up_proj"):
            setattr(self, name, BranchInputLinear(getattr(self, name), config.branches))
        self.down_proj = BranchOutputLinear(
            self.down_proj, config.branches, config.is_dropped(2 * layer_idx + 1)
        )
        self.add_branch_vectors(config, layer_idx, "mlp")


class SPDLlamaDecoderLayer(LlamaDecoderLayer):
    """One block under the rule.

    Between blocks joined by a dropped MLP point X and all P_g travel as one tensor [b, s, (1 + G) * h], so that
    transformers' loop over layers, gradient checkpointing and device placement work as they are.
    """

    self_attn: SPDLlamaAttention
    mlp: SPDLlamaMLP

    def __init__(self, config: SPDLlamaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.self_attn = SPDLlamaAttention(config, layer_idx)
        self.mlp = SPDLlamaMLP(config, layer_idx)

    # transformers passes everything but the hidden states by keyword, and the attention takes what it needs.
    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:  # type: ignore[override]
        x, pending = split_state(hidden_states, self.hidden_size)
        z = branch_input(x, pending, self.self_attn, self.input_layernorm)
        out, _ = self.self_attn(hidden_states=z, **kwargs)
        x, pending = add_output(x, pending, out, self.self_attn.o_proj)

        z = branch_input(x, pending, self.mlp, self.post_attention_layernorm)
        x, pending = add_output(x, pending, self.mlp(z), self.mlp.down_proj)
        return x if pending is None else torch.cat([x, pending], -1)


def split_state(state: Tensor, hidden_size: int) -> tuple[Tensor, Tensor | None]:
    """X [b, s, h] and, if anything is pending, P [b, s, G * h]."""
    if state.shape[-1] == hidden_size:
        return state, None
    return state[..., :hidden_size], state[..., hidden_size:]


def branch_input(x: Tensor, pending: Tensor | None, own: BranchVectors, norm: LlamaRMSNorm) -> Tensor:
    """norm(X + P_g + c_g) * w_g + b_g: [b, s, h] where all branches see the same, else [b, s, G * h]."""
    shift, weight, bias = own.spd_shift, own.spd_norm_weight, own.spd_norm_bias
    if pending is None and shift is None and weight is None:
        return norm(x)
    z = x.unsqueeze(-2)
    if pending is not None:
        z = z + pending.unflatten(-1, (-1, x.shape[-1]))
    if shift is not None:
        z = z + shift
    z = norm(z)
    if weight is not None and bias is not None:
        z = torch.addcmul(bias, z, weight)
    return z.flatten(-2)


def add_output(
    x: Tensor, pending: Tensor | None, out: Tensor, projection: BranchOutputLinear
) -> tuple[Tensor, Tensor | None]:
    """X and P after a sublayer whose output projection gave ``out``: the second half of the rule."""
    if projection.bias is not None:
        x = x + projection.bias
    if projection.partial:
        return x, out if pending is None else pending + out
    x = x + out
    return (x if pending is None else x + sum_branches(pending, x.shape[-1])), None


def sum_branches(pending: Tensor, hidden_size: int) -> Tensor:
    """[b, s, G * h] -> [b, s, h]."""
    return pending.unflatten(-1, (-1, hidden_size)).sum(-2)


def _sync_recorded_states(model: LlamaModel, args: Any, output: Any) -> None:
    """Forward hook: where ``output_hidden_states`` recorded X and P, give X + sum over g of P_g, as if synced there."""
    recorded = getattr(output, "hidden_states", None)
    if recorded is not None:
        h = model.config.hidden_size
        states = (None if state is None else split_state(state, h) for state in recorded)
        output.hidden_states = tuple(
            s if s is None else s[0] if s[1] is None else s[0] + sum_branches(s[1], h) for s in states
        )


class SPDLlamaForCausalLM(LlamaForCausalLM):
    """LlamaForCausalLM whose blocks follow ``config.spd_plan``."""

    config_class = SPDLlamaConfig
    # Tensor parallelism by transformers' own rules would compute the dense formula.
    _tp_plan = None  # type: ignore[assignment]

    def __init__(self, config: SPDLlamaConfig) -> None:
        super().__init__(config)
        for i in range(config.num_hidden_layers):
            if not config.is_plain(i):
                self.model.layers[i] = SPDLlamaDecoderLayer(config, i)
        self.model.register_forward_hook(_sync_recorded_states)
        self.post_init()


__all__ = ["SPDLlamaForCausalLM"]
