"""The sync-point rule (method section 9) as plain formulas in float64 on one process.

Everything that computes an SPD block is compared with this file. It is written for reading: no Megatron, no
transformers, one loop over sublayers, one over branches. Weights go by Hugging Face Llama names relative to a block,
whatever the family.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Shape:
    """hidden h, query heads, key/value groups, head size, MLP neurons (of one expert); ``gated``: SwiGLU, else the
    activation of ``up``; ``rope_theta`` None: no rotary embedding; ``window``: keys that a query sees, its own
    included; ``experts``, of which ``chosen`` run for each token, their weights ``renormalised`` to a sum of 1;
    ``one_router``: by the first branch's choice for all."""

    hidden: int
    heads: int
    kv_groups: int
    head_dim: int
    ffn: int
    gated: bool = True
    eps: float = 1e-5
    rope_theta: float | None = 10000.0
    layer_norm: bool = False
    activation: str = "silu"
    window: int | None = None
    qk_norm: bool = False
    experts: int = 0
    chosen: int = 0
    renormalised: bool = True
    one_router: bool = False


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def norm(x: Tensor, w: Weights, name: str, shape: Shape) -> Tensor:
    """RMSNorm, or LayerNorm with its bias."""
    if not shape.layer_norm:
        return rms_norm(x, w[f"{name}.weight"], shape.eps)
    centred = x - x.mean(-1, keepdim=True)
    return rms_norm(centred, w[f"{name}.weight"], shape.eps) + w[f"{name}.bias"]


def rope(x: Tensor, theta: float) -> Tensor:
    """Rotary embedding, halves convention; x [s, b, n, d]."""
    s, d = x.shape[0], x.shape[-1]
    freq = theta ** (-torch.arange(0, d, 2, dtype=x.dtype) / d)
    angle = torch.outer(torch.arange(s, dtype=x.dtype), freq)
    angle = torch.cat([angle, angle], -1)[:, None, None, :]
    left, right = x.chunk(2, -1)
    return x * angle.cos() + torch.cat([-right, left], -1) * angle.sin()


def _linear(x: Tensor, w: Weights, name: str, rows: slice = slice(None)) -> Tensor:
    out = x @ w[f"{name}.weight"][rows].T
    bias = w.get(f"{name}.bias")
    return out if bias is None else out + bias[rows]


def attention_branch(z: Tensor, w: Weights, shape: Shape, g: int, branches: int) -> Tensor:
    """Partial attention output of branch ``g`` without o_proj's bias: [s, b, h]."""
    s, b, _ = z.shape
    d, nq, nkv = shape.head_dim, shape.heads // branches, shape.kv_groups // branches
    q_rows, kv_rows = slice(g * nq * d, (g + 1) * nq * d), slice(g * nkv * d, (g + 1) * nkv * d)
    q = _linear(z, w, "self_attn.q_proj", q_rows).view(s, b, nq, d)
    k = _linear(z, w, "self_attn.k_proj", kv_rows).view(s, b, nkv, d)
    if shape.qk_norm:
        q, k = (rms_norm(t, w[f"self_attn.{n}_norm.weight"], shape.eps) for t, n in ((q, "q"), (k, "k")))
    if shape.rope_theta is not None:
        q, k = rope(q, shape.rope_theta), rope(k, shape.rope_theta)
    v = _linear(z, w, "self_attn.v_proj", kv_rows).view(s, b, nkv, d)
    k, v = k.repeat_interleave(nq // nkv, 2), v.repeat_interleave(nq // nkv, 2)
    scores = torch.einsum("sbnd,tbnd->bnst", q, k) / d**0.5
    distance = torch.arange(s)[:, None] - torch.arange(s)
    hidden = (distance < 0) | (distance >= (shape.window or s))
    scores = scores.masked_fill(hidden, float("-inf"))
    context = torch.einsum("bnst,tbnd->sbnd", scores.softmax(-1), v).reshape(s, b, nq * d)
    return context @ w["self_attn.o_proj.weight"][:, q_rows].T


def routing(z: Tensor, w: Weights, shape: Shape) -> Tensor:
    """Weight of every expert, 0 for those not chosen: z [s, b, h] -> [s, b, experts]."""
    probabilities = _linear(z, w, "mlp.gate").softmax(-1)
    chosen = torch.zeros_like(probabilities).scatter(-1, probabilities.topk(shape.chosen, -1).indices, 1.0)
    weights = probabilities * chosen
    return weights / weights.sum(-1, keepdim=True) if shape.renormalised else weights


def mlp_branch(
    z: Tensor, w: Weights, shape: Shape, g: int, branches: int, routed_by: Tensor | None = None
) -> Tensor:
    """Partial MLP output of branch ``g`` without down_proj's bias: [s, b, h]. ``routed_by``: what the router sees, if
    not ``z``."""
    if not shape.experts:
        return _expert(z, w, "mlp", shape, g, branches)
    weights = routing(z if routed_by is None else routed_by, w, shape)
    parts = [_expert(z, w, f"mlp.experts.{e}", shape, g, branches) for e in range(shape.experts)]
    return sum(weights[..., e, None] * part for e, part in enumerate(parts))


def _expert(z: Tensor, w: Weights, name: str, shape: Shape, g: int, branches: int) -> Tensor:
    n = shape.ffn // branches
    rows = slice(g * n, (g + 1) * n)
    activation = getattr(torch.nn.functional, shape.activation)
    up = _linear(z, w, f"{name}.up_proj", rows)
    act = activation(_linear(z, w, f"{name}.gate_proj", rows)) * up if shape.gated else activation(up)
    return act @ w[f"{name}.down_proj.weight"][:, rows].T


def _split(parts: Sequence[Tensor], count: int) -> list[Sequence[Tensor]]:
    size = len(parts) // count
    return [parts[i : i + size] for i in range(0, len(parts), size)]


def _parts_of_branches(
    sublayer: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    before: Sequence[Tensor],
    w: Weights,
    shape: Shape,
    ranks: int,
    mask: Tensor | None,
) -> list[Tensor]:
    """What each of ``ranks`` > G ranks gives to an all-reduce: its part of its branch's output, to which the first rank
    of a branch adds what the branch had ``before``."""
    copies = ranks // len(inputs)
    parts = [sublayer(inputs[r // copies], w, shape, r, ranks) for r in range(ranks)]
    parts = [part if mask is None else part * mask for part in parts]
    return [part if r % copies else part + before[r // copies] for r, part in enumerate(parts)]


def low_bit_sum(held: Sequence[Tensor], bits: int, group: int) -> Tensor:
    """The two-step all-reduce of method section 5, value by value; ``held[r]`` is rank r's tensor."""
    if len(held) == 1:
        return held[0]
    return rounded(sum(rounded(t, bits, group) for t in held), bits, group)


def rounded(x: Tensor, bits: int, group: int) -> Tensor:
    """What is left of ``x`` after quantisation in groups of its flat order, the last one filled up with zeros. The
    first smallest and the first largest value of a group are rounded by themselves."""
    values = x.detach().flatten().tolist()
    values += [0.0] * (-len(values) % group)
    levels = 2**bits - 1
    for start in range(0, len(values), group):
        part = values[start : start + group]
        spikes = {part.index(min(part)), part.index(max(part))}
        others = [v for i, v in enumerate(part) if i not in spikes]
        zero = to_bfloat16(min(others), math.floor)
        step = to_bfloat16((max(others) - zero) / levels, math.ceil)
        for i, v in enumerate(part):
            code = math.floor((v - zero) / step + 0.5) if step else 0
            values[start + i] = to_bfloat16(v, round) if i in spikes else code * step + zero
    return torch.tensor(values[: x.numel()], dtype=x.dtype).view(x.shape)


def to_bfloat16(value: float, direction: Callable[[float], int]) -> float:
    """``value`` rounded to the 8 significant bits of bfloat16, down by ``math.floor``, up by ``math.ceil``
    or to the nearest by ``round``."""
    fraction, exponent = math.frexp(value)
    return math.ldexp(direction(fraction * 256), exponent - 8)


def blocks_forward(
    x: Tensor,
    blocks: Sequence[Weights],
    shape: Shape,
    branches: int,
    dropped: Sequence[int],
    masks: Mapping[int, Tensor] | None = None,
    low_bit: Mapping[int, tuple[int, int]] | None = None,
    ranks: int | None = None,
) -> Tensor:
    """Run consecutive blocks on ``x`` [s, b, h]; ``dropped`` are sync points counted from the first of ``blocks``.

    ``masks[p]`` [s, b, h] multiplies the output of the sublayer before point ``p`` (dropout). ``low_bit[p]``: bits and
    group of the low-bit all-reduce at point ``p``, of what each of ``ranks`` (default: as many as branches) holds.
    What is pending at the end is synced there.
    """
    pending = [torch.zeros_like(x) for _ in range(branches)]
    last = 2 * len(blocks) - 1
    for p in range(last + 1):
        w = blocks[p // 2]
        is_attention = p % 2 == 0
        prefix = "self_attn" if is_attention else "mlp"
        norm_name = "input_layernorm" if is_attention else "post_attention_layernorm"
        bias = w.get("self_attn.o_proj.bias" if is_attention else "mlp.down_proj.bias")
        shift = w.get(f"{prefix}.spd_shift")
        norm_weight, norm_bias = w.get(f"{prefix}.spd_norm_weight"), w.get(f"{prefix}.spd_norm_bias")
        mask = masks[p] if masks is not None else None
        sublayer = attention_branch if is_attention else mlp_branch
        inputs, before = [], list(pending)
        for g in range(branches):
            z = x + pending[g] if shift is None else x + pending[g] + shift[g]
            z = norm(z, w, norm_name, shape)
            if norm_weight is not None and norm_bias is not None:
                z = z * norm_weight[g] + norm_bias[g]
            inputs.append(z)
            if is_attention:
                out = attention_branch(z, w, shape, g, branches)
            else:
                out = mlp_branch(z, w, shape, g, branches, inputs[0] if shape.one_router else None)
            pending[g] = pending[g] + (out if mask is None else out * mask)
        if bias is not None:
            x = x + (bias if mask is None else bias * mask)
        if p not in dropped or p == last:
            total = sum(pending)
            if low_bit and p in low_bit:
                if ranks is not None and ranks > branches:
                    held = _parts_of_branches(sublayer, inputs, before, w, shape, ranks, mask)
                else:
                    held = [sum(part) for part in _split(pending, ranks or branches)]
                # The gradient passes the rounding by.
                total = total + (low_bit_sum(held, *low_bit[p]) - total).detach()
            x = x + total
            pending = [torch.zeros_like(x) for _ in range(branches)]
    return x


def random_block(
    shape: Shape,
    branches: int,
    generator: torch.Generator,
    biases: bool,
    shifts: tuple[bool, bool] = (False, False),
    norms: tuple[bool, bool] = (False, False),
) -> dict[str, Tensor]:
    """Random float64 weights of one block, scaled so that branch effects are large. ``shifts``, ``norms``: which of
    (attention, MLP) has a shift, a norm weight and bias for every branch."""

    def draw(*size: int, scale: float) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64) * scale

    h, d = shape.hidden, shape.head_dim
    q, kv, f = shape.heads * d, shape.kv_groups * d, shape.ffn
    sizes = {
        "self_attn.q_proj": (q, h),
        "self_attn.k_proj": (kv, h),
        "self_attn.v_proj": (kv, h),
        "self_attn.o_proj": (h, q),
        "mlp.up_proj": (f, h),
        "mlp.down_proj": (h, f),
    }
    if shape.gated:
        sizes["mlp.gate_proj"] = (f, h)
    w = {f"{name}.weight": draw(*size, scale=1.5 * size[1] ** -0.5) for name, size in sizes.items()}
    if biases:
        w |= {f"{name}.bias": draw(size[0], scale=0.3) for name, size in sizes.items()}
    for name in ("input_layernorm", "post_attention_layernorm"):
        w[f"{name}.weight"] = 1 + draw(h, scale=0.2)
        if shape.layer_norm:
            w[f"{name}.bias"] = draw(h, scale=0.3)
    if shape.qk_norm:
        w |= {f"self_attn.{name}_norm.weight": 1 + draw(d, scale=0.2) for name in "qk"}
    for name, wanted in zip(("self_attn.spd_shift", "mlp.spd_shift"), shifts, strict=True):
        if wanted:
            w[name] = draw(branches, h, scale=0.5)
    for name, wanted in zip(("self_attn.spd_norm", "mlp.spd_norm"), norms, strict=True):
        if wanted:
            w[f"{name}_weight"] = 1 + draw(branches, h, scale=0.3)
            w[f"{name}_bias"] = draw(branches, h, scale=0.3)
    return w


def model_logits(
    ids: Tensor,
    outer: Weights,
    blocks: Sequence[Weights],
    shape: Shape,
    branches: int,
    dropped: Sequence[int],
) -> Tensor:
    """Logits [b, s, vocabulary] for ``ids`` [b, s]. ``outer``: "embedding.weight", "norm.weight", "output.weight", and
    "norm.bias" and "positions.weight" (row p for position p) where the model has them."""
    x = outer["embedding.weight"][ids].transpose(0, 1)
    if "positions.weight" in outer:
        x = x + outer["positions.weight"][: len(x), None]
    x = blocks_forward(x, blocks, shape, branches, dropped)
    return (norm(x, outer, "norm", shape) @ outer["output.weight"].T).transpose(0, 1)
