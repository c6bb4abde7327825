"""A block's sublayers in plain operations, every branch in one process: what calibration looks inside.

Megatron-core's modules (``layers/``) compute the rule and hide what grouping needs: activations of single neurons,
attention maps, parts by branch. Here a block's full tensors are taken as they are, by their Hugging Face Llama names,
and nothing is communicated: calibration is data parallel. Hidden states are [s, b, h], by branch [G, s, b, h].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from megatron_spd.errors import UserError
from megatron_spd.models.build import ModelShape, inverse_frequencies
from megatron_spd.models.family import Activation
from megatron_spd.models.norm import Norm, NormKind
from megatron_spd.plan import BaseModel

#: Why a model with experts is not calibrated, for its ``model_type``.
CALIBRATION_REFUSED = (
    "calibration and head grouping look at the neurons of one MLP, and a {} block has several; use --recovery zs, or "
    "paper (which distils, without head grouping)"
)
#: Attention probabilities held at a time, in elements (256 MiB in float32).
_CHUNK_ELEMENTS = 2**26


@dataclass(frozen=True)
class AttentionSettings:
    """What the weights do not say. ``inv_freq`` [head_dim / 2]: rotary frequencies, scaling included; None: learned
    positions. ``window``: keys that a query sees; None: all before it."""

    head_dim: int
    inv_freq: Tensor | None
    norm_eps: float
    norm: NormKind = "RMSNorm"
    activation: Activation = "silu"
    window: int | None = None

    @classmethod
    def of(cls, shape: ModelShape) -> AttentionSettings:
        """Those of a model. Raises UserError for a rotary scaling without a counterpart here, and for experts."""
        family, settings = shape.family, shape.settings
        if settings.experts is not None:
            raise UserError(CALIBRATION_REFUSED.format(family.model_type))
        inv_freq = inverse_frequencies(shape) if family.positions is None else None
        return cls(
            shape.head_dim, inv_freq, settings.norm_eps, family.norm, family.activation, settings.window
        )


class BlockFormulas:
    """One block, cut into ``branches`` equal contiguous parts of its heads and neurons.

    ``weights``: the block's full tensors by block-relative name, all of one dtype and device. Inputs of the sublayers
    ``z`` are [1, s, b, h] where all branches see the same, else [G, s, b, h].
    """

    def __init__(
        self, weights: Mapping[str, Tensor], base: BaseModel, settings: AttentionSettings, branches: int = 1
    ) -> None:
        self.weights, self.base, self.settings, self.branches = weights, base, settings, branches

    def normed(self, x: Tensor, sublayer: str) -> Tensor:
        """The norm in front of ``sublayer`` ("attention" or "mlp")."""
        name = "input_layernorm" if sublayer == "attention" else "post_attention_layernorm"
        weight, bias = self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias")
        return Norm(self.settings.norm, self.settings.norm_eps, weight, bias)(x)

    def partial(self, sublayer: str, z: Tensor) -> Tensor:
        """Partial outputs of all branches [G, s, b, h], output bias not included."""
        return self.attention(z) if sublayer == "attention" else self.mlp(z)

    # ---- attention --------------------------------------------------------------------------------------------

    def attention(self, z: Tensor) -> Tensor:
        """A_g of all branches [G, s, b, h]."""
        return self.project(self.context(z), "self_attn.o_proj")

    def context(self, z: Tensor) -> Tensor:
        """What o_proj sees [s, b, heads * head_dim]: causal attention, positions from 0."""
        q, k, v = self._heads(z)
        if self.settings.window is None:
            out = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            place = torch.arange(q.shape[2], device=z.device)
            seen = ~self._hidden(place[:, None], place)
            out = functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return out.permute(2, 0, 1, 3).flatten(2)

    def attention_maps(self, z: Tensor) -> Iterator[Tensor]:
        """Attention probabilities in pieces [b, heads, some queries, s], for ``z`` [1, s, b, h]."""
        q, k, _ = self._heads(z)
        s = q.shape[2]
        place = torch.arange(s, device=z.device)
        rows = max(1, _CHUNK_ELEMENTS // (q.shape[0] * q.shape[1] * s))
        for start in range(0, s, rows):
            scores = q[:, :, start : start + rows] @ k.transpose(2, 3) / self.settings.head_dim**0.5
            hidden = self._hidden(place[start : start + rows, None], place)
            yield scores.masked_fill(hidden, float("-inf")).softmax(-1)

    def _hidden(self, query: Tensor, key: Tensor) -> Tensor:
        """Which places ``key`` [s] a query at places ``query`` [q, 1] does not see: [q, s]."""
        hidden = key > query
        return hidden if self.settings.window is None else hidden | (query - key >= self.settings.window)

    def _heads(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v [b, heads, s, head_dim], normed and rotated, key/value groups repeated for their query heads."""
        d, repeat = self.settings.head_dim, self.base.num_attention_heads // self.base.num_key_value_heads
        q, k, v = (
            self._head_normed(name, self.read(z, f"self_attn.{name}_proj").unflatten(-1, (-1, d)))
            for name in "qkv"
        )
        q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
        k, v = (t.repeat_interleave(repeat, 1) for t in (self._rotated(k), v))
        return self._rotated(q), k, v

    def _head_normed(self, name: str, x: Tensor) -> Tensor:
        """Query or key heads [..., d] behind their own norm, where the family has one."""
        weight = self.weights.get(f"self_attn.{name}_norm.weight")
        return x if weight is None else Norm(self.settings.norm, self.settings.norm_eps, weight)(x)

    def _rotated(self, x: Tensor) -> Tensor:
        """Rotary embedding, halves convention; x [b, heads, s, d]."""
        if self.settings.inv_freq is None:
            return x
        place = torch.arange(x.shape[2], device=x.device)
        angle = torch.outer(place, self.settings.inv_freq.to(x.device))
        angle = torch.cat([angle, angle], -1).to(x.dtype)
        left, right = x.chunk(2, -1)
        return x * angle.cos() + torch.cat([-right, left], -1) * angle.sin()

    # ---- MLP --------------------------------------------------------------------------------------------------

    def mlp(self, z: Tensor) -> Tensor:
        """F_g of all branches [G, s, b, h]."""
        return self.project(self.activations(z), "mlp.down_proj")

    def activations(self, z: Tensor) -> Tensor:
        """What down_proj sees [s, b, ffn], each neuron in its branch; for ``z`` [1, s, b, h] all see the same."""
        activation = getattr(functional, self.settings.activation)
        if "mlp.gate_proj.weight" not in self.weights:
            return activation(self.read(z, "mlp.up_proj"))
        return activation(self.read(z, "mlp.gate_proj")) * self.read(z, "mlp.up_proj")

    # ---- projections ------------------------------------------------------------------------------------------

    def read(self, z: Tensor, name: str) -> Tensor:
        """A projection whose output rows are split over branches: z -> [s, b, out]."""
        weight, bias = self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias")
        if z.shape[0] == 1:
            return functional.linear(z[0], weight, bias)
        runs = weight.chunk(self.branches)
        out = torch.cat([functional.linear(x, w) for x, w in zip(z, runs, strict=True)], -1)
        return out if bias is None else out + bias

    def project(self, x: Tensor, name: str) -> Tensor:
        """A projection whose input columns are split over branches: [s, b, in] -> [G, s, b, h]; bias not added."""
        runs = zip(
            x.chunk(self.branches, -1), self.weights[f"{name}.weight"].chunk(self.branches, 1), strict=True
        )
        return torch.stack([functional.linear(part, w) for part, w in runs])

    def output_bias(self, sublayer: str) -> Tensor | None:
        """The output bias b of ``sublayer`` [h], or None."""
        return self.weights.get("self_attn.o_proj.bias" if sublayer == "attention" else "mlp.down_proj.bias")
