"""A model with dropped tensor-parallel sync points (Sync-Point Drop, "SPD"), all G branches on one device.

This file is shipped inside exported model folders: it needs torch and transformers and nothing else.
``SPD<Family>ForCausalLM`` is made here of transformers' ``<Family>ForCausalLM`` when it is asked for.

The rule. The state between sublayers is X, the synced residual, and P_g, branch g's pending partial sum. For each
sublayer (attention or MLP) with output bias b, optional shift c_g (else 0) and optional branch norm w_g, b_g (else 1
and 0):

    z_g = norm(X + P_g + c_g) * w_g + b_g;   P_g += sublayer_g(z_g);   X += b
    if the sync point after it is kept:   X += sum over g of P_g;   P_g = 0

Branch g holds the g-th of G equal contiguous parts of the key/value groups (with their query heads) and of the MLP
neurons. With every point kept this is the dense model, and blocks in which nothing is dropped, pending or different
for each branch are transformers' own. The others are transformers' own with other projections in them, which take and
give tensors whose last axis holds the branches one after the other, [b, s, G * h], and another forward around
attention and MLP. Parts of a block go by a Llama's names here; ``config.stored_name`` says what a family calls them.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel, conversion_mapping

from .configuration_spd import config_class


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


class BranchExperts(nn.Module):
    """A family's experts, every one of them split over branches, in the place of its own module of experts.

    ``partial``: keep the branches' outputs apart.
    """

    bias = None

    def __init__(self, like: Any, branches: int, partial: bool) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty_like(like.gate_up_proj))
        self.down_proj = nn.Parameter(torch.empty_like(like.down_proj))
        self.act_fn = like.act_fn
        self.branches, self.partial = branches, partial

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """``x`` [t, h] or [t, G, h]; ``chosen``, ``weights`` [t, k] or [t, G, k]: experts of each token, the same for
        all branches or for each its own -> [t, h], or [t, G, h] if ``partial``."""
        parts = [
            self._branch(g, *(t if t.dim() == 2 else t[:, g] for t in (x, chosen, weights)))
            for g in range(self.branches)
        ]
        return torch.stack(parts, 1) if self.partial else sum(parts[1:], parts[0])

    def _branch(self, g: int, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        gate_up = self.gate_up_proj.unflatten(1, (2, self.branches, -1))[:, :, g].flatten(1, 2)
        down = self.down_proj.unflatten(2, (self.branches, -1))[:, :, g]
        out = torch.zeros_like(x)
        for number in range(len(down)):
            tokens, places = torch.where(chosen == number)
            gate, up = functional.linear(x[tokens], gate_up[number]).chunk(2, -1)
            part = functional.linear(self.act_fn(gate) * up, down[number])
            out = out.index_add(0, tokens, part * weights[tokens, places, None])
        return out


class BranchVectors(nn.Module):
    """Holds the vectors at a sublayer's input for a family that has no module for the sublayer."""


def add_branch_vectors(module: Any, config: Any, layer: int, sublayer: str) -> None:
    """Give ``module`` the vectors [G, h] that the plan has for ``sublayer`` ("attention" or "mlp"): shift c_g, norm
    weight w_g, norm bias b_g; None for the others."""
    size = (config.branches, config.hidden_size)
    shift, norm = config.has_shift(layer, sublayer), config.has_norm(layer, sublayer)
    module.spd_shift = nn.Parameter(torch.zeros(size)) if shift else None
    module.spd_norm_weight = nn.Parameter(torch.ones(size)) if norm else None
    module.spd_norm_bias = nn.Parameter(torch.zeros(size)) if norm else None


class SyncPointRule(nn.Module):
    """Mixed in front of a family's decoder layer: one block under the rule.

    Between blocks joined by a dropped MLP point X and all P_g travel as one tensor [b, s, (1 + G) * h], so that
    transformers' loop over layers, gradient checkpointing and device placement work as they are.
    """

    self_attn: Any
    mlp: Any
    #: Of families that have them: the activation of a plain MLP, the dropout of a sublayer's output.
    activation_fn: Any
    dropout: float = 0.0

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.stored_name, self.state_size = config.stored_name, config.hidden_size
        if not hasattr(self, "mlp"):
            self.mlp = BranchVectors()
        for name in (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
        ):
            if self.has_part(name):
                reader = BranchInputLinear(self.part(name), config.branches)
                self.set_submodule(self.stored_name(name), reader)
        self.one_router = config.one_router
        for point, name in enumerate(("self_attn.o_proj", self._mlp_writer), 2 * layer_idx):
            kind = BranchExperts if name == "mlp.experts" else BranchOutputLinear
            writer = kind(self.part(name), config.branches, config.is_dropped(point))
            self.set_submodule(self.stored_name(name), writer)
        add_branch_vectors(self.self_attn, config, layer_idx, "attention")
        add_branch_vectors(self.mlp, config, layer_idx, "mlp")

    @property
    def _mlp_writer(self) -> str:
        """The part of the block whose output is the MLP's."""
        return "mlp.experts" if hasattr(self.mlp, "experts") else "mlp.down_proj"

    def part(self, name: str) -> Any:
        """The part of the block that Llama calls ``name``. Raises AttributeError where the family has none."""
        return self.get_submodule(self.stored_name(name))

    def has_part(self, name: str) -> bool:
        """Whether the family has what Llama calls ``name`` (a plain MLP has no gate)."""
        parent, _, own = self.stored_name(name).rpartition(".")
        return hasattr(self.get_submodule(parent), own)

    # transformers passes everything but the hidden states by keyword, and the attention takes what it needs.
    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """X [b, s, h], or X and P [b, s, (1 + G) * h] -> the same."""
        x, pending = split_state(hidden_states, self.state_size)
        z = branch_input(x, pending, self.self_attn, self.part("input_layernorm"))
        out, _ = self.self_attn(hidden_states=z, **kwargs)
        x, pending = self._add_output(x, pending, out, self.part("self_attn.o_proj"))

        z = branch_input(x, pending, self.mlp, self.part("post_attention_layernorm"))
        x, pending = self._add_output(x, pending, self._mlp(z), self.part(self._mlp_writer))
        return x if pending is None else torch.cat([x, pending], -1)

    def _mlp(self, z: Tensor) -> Tensor:
        if hasattr(self.mlp, "experts"):
            return self._mixture(z)
        if not isinstance(self.mlp, BranchVectors):
            return self.mlp(z)
        return self.part("mlp.down_proj")(self.activation_fn(self.part("mlp.up_proj")(z)))

    def _mixture(self, z: Tensor) -> Tensor:
        """``z`` [b, s, h] or [b, s, G * h] -> as :class:`BranchOutputLinear` gives it. The router sees what a branch
        sees."""
        x = z.flatten(0, 1)
        if x.shape[-1] != self.state_size:
            x = x.unflatten(-1, (-1, self.state_size))
        seen = x[:, 0] if self.one_router and x.dim() == 3 else x
        _, weights, chosen = self.mlp.gate(seen)
        if seen.dim() == 3:
            weights, chosen = (t.unflatten(0, seen.shape[:2]) for t in (weights, chosen))
        return self.mlp.experts(x, chosen, weights).flatten(1).unflatten(0, z.shape[:2])

    def _add_output(
        self, x: Tensor, pending: Tensor | None, out: Tensor, projection: BranchOutputLinear | BranchExperts
    ) -> tuple[Tensor, Tensor | None]:
        """X and P after a sublayer whose output projection gave ``out``: the second half of the rule."""
        bias: Tensor | None = projection.bias
        if self.training and self.dropout:
            # One mask for all branches and the bias: what is dropped out does not depend on where sums are made.
            mask = functional.dropout(torch.ones_like(x), self.dropout)
            out = (out.unflatten(-1, (-1, self.state_size)) * mask.unsqueeze(-2)).flatten(-2)
            bias = None if bias is None else bias * mask
        if bias is not None:
            x = x + bias
        if projection.partial:
            return x, out if pending is None else pending + out
        x = x + out
        return (x if pending is None else x + sum_branches(pending, self.state_size)), None


def split_state(state: Tensor, hidden_size: int) -> tuple[Tensor, Tensor | None]:
    """X [b, s, h] and, if anything is pending, P [b, s, G * h]."""
    if state.shape[-1] == hidden_size:
        return state, None
    return state[..., :hidden_size], state[..., hidden_size:]


def branch_input(x: Tensor, pending: Tensor | None, own: Any, norm: nn.Module) -> Tensor:
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


def sum_branches(pending: Tensor, hidden_size: int) -> Tensor:
    """[b, s, G * h] -> [b, s, h]."""
    return pending.unflatten(-1, (-1, hidden_size)).sum(-2)


def _sync_recorded_states(decoder: Any, args: Any, output: Any) -> None:
    """Forward hook: where ``output_hidden_states`` recorded X and P, give X + sum over g of P_g, as if synced there."""
    recorded = getattr(output, "hidden_states", None)
    if recorded is not None:
        h = decoder.config.hidden_size
        states = (None if state is None else split_state(state, h) for state in recorded)
        output.hidden_states = tuple(
            s if s is None else s[0] if s[1] is None else s[0] + sum_branches(s[1], h) for s in states
        )


class SPDForCausalLM:
    """Mixed in front of a family's model: blocks follow ``config.spd_plan``."""

    # Tensor parallelism by transformers' own rules would compute the dense formula.
    _tp_plan = None

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        model: Any = self
        decoder = model.get_decoder()
        for i, layer in enumerate(decoder.layers):
            if not config.is_plain(i):
                decoder.layers[i] = _layer_class(type(layer))(config, i)
        decoder.register_forward_hook(_sync_recorded_states)
        model.post_init()


_made: dict[str, type] = {}


def _layer_class(dense: type[nn.Module]) -> type[nn.Module]:
    """``dense`` under the rule: ``SPD<Family>DecoderLayer``."""
    name = f"SPD{dense.__name__}"
    if name not in _made:
        _made[name] = type(name, (SyncPointRule, dense), {"__module__": __name__})
    return _made[name]


def _model_class(name: str, dense: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The class ``name`` for exports of ``dense`` models."""
    if name not in _made:
        dense_config: Any = dense.config_class
        config = config_class(f"SPD{dense_config.__name__}", dense_config)
        # Experts are stored one by one, and transformers joins them when it loads the dense model.
        stored_as = conversion_mapping.get_checkpoint_conversion_mapping(dense_config.model_type)
        if stored_as is not None:
            conversion_mapping.register_checkpoint_conversion_mapping(
                config.model_type, stored_as, overwrite=True
            )
        body = {"__module__": __name__, "__doc__": f"{dense.__name__} under a plan.", "config_class": config}
        _made[name] = type(name, (SPDForCausalLM, dense), body)
    return _made[name]


def __getattr__(name: str) -> type[PreTrainedModel]:
    dense = getattr(transformers, name.removeprefix("SPD"), None)
    if not (name.startswith("SPD") and isinstance(dense, type) and issubclass(dense, PreTrainedModel)):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _model_class(name, dense)
