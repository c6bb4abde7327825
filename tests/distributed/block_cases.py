"""Runs one case of the Megatron layer on a rank and hands back full tensors, for comparison with
``tests.reference``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_spd.collective import CollectiveFormat
from megatron_spd.layers.norm import sum_gradients_in_backward
from megatron_spd.models.build import BlockUnit, ModelShape, layer_shard
from megatron_spd.models.llama import LLAMA
from megatron_spd.models.tables import block_tables
from megatron_spd.models.weights import unshard_block
from megatron_spd.plan import BaseModel, SPDPlan
from megatron_spd.runtime.distributed import Runtime, initialize, tensor_parallel_seed
from tests.reference import Shape, blocks_forward, random_block

#: A Llama whose MLP has no gate.
PLAIN = dataclasses.replace(LLAMA, tables=block_tables(gated=False))


@dataclass(frozen=True)
class Case:
    """A run of blocks with random weights. ``dropped``: sync points; ``shifts``, ``norms``: sublayers whose input
    has a shift, whose norm has a weight and bias for every branch, named by the point after the sublayer.
    ``collective``: of all kept points, the same bits in both steps. ``length``: of the sequences."""

    branches: int
    layers: int
    dropped: tuple[int, ...]
    heads: int = 12
    kv_groups: int = 12
    ffn: int = 24
    hidden: int = 16
    gated: bool = True
    biases: bool = False
    shifts: tuple[int, ...] = ()
    norms: tuple[int, ...] = ()
    collective: str = "full"
    dropout: float = 0.0
    recompute: bool = False
    sequence_parallel: bool = False
    length: int = 7
    dtype: str = "float32"
    seed: int = 0
    overrides: Mapping[str, Any] = field(default_factory=dict)

    @property
    def shape(self) -> Shape:
        return Shape(self.hidden, self.heads, self.kv_groups, 4, self.ffn, self.gated)

    def plan(self) -> SPDPlan:
        base = BaseModel("f", "llama", self.layers, self.hidden, self.heads, self.kv_groups, self.ffn)
        plan = SPDPlan.dense(base, self.branches).with_drops(self.dropped)
        plan = plan.with_collectives(self.collective, self.collective)
        for i in range(self.layers):
            plan = plan.with_block(
                i,
                attention_shift=2 * i in self.shifts,
                mlp_shift=2 * i + 1 in self.shifts,
                attention_norm=2 * i in self.norms,
                mlp_norm=2 * i + 1 in self.norms,
            )
        return plan

    def weights(self) -> list[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed)
        return [
            random_block(
                self.shape,
                self.branches,
                generator,
                self.biases,
                (2 * i in self.shifts, 2 * i + 1 in self.shifts),
                (2 * i in self.norms, 2 * i + 1 in self.norms),
            )
            for i in range(self.layers)
        ]

    def data(self) -> tuple[Tensor, Tensor]:
        """Input and upstream gradient, [length, 2, h]."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        x, up = torch.randn(2, self.length, 2, self.hidden, generator=generator, dtype=torch.float64)
        return x, up

    def masks(self) -> dict[int, Tensor] | None:
        """The dropout masks that the layers will draw from a generator seeded with 77."""
        if not self.dropout:
            return None
        torch.manual_seed(77)
        ones = torch.ones(self.length, 2, self.hidden)
        return {p: torch.nn.functional.dropout(ones, self.dropout).double() for p in range(2 * self.layers)}


def reference_result(case: Case, ranks: int | None = None) -> dict[str, Tensor]:
    """Output, input gradient and all weight gradients in float64 by the plain formula; ``ranks``: those that a low-bit
    all-reduce has, by default one for each branch."""
    weights = [{n: t.requires_grad_() for n, t in w.items()} for w in case.weights()]
    x, up = case.data()
    x.requires_grad_()
    plan = case.plan()
    formats = {p: CollectiveFormat.parse(c).scatter for p, c in plan.low_bit.items()}
    low_bit = {p: (q.bits, q.group) for p, q in formats.items()}
    out = blocks_forward(x, weights, case.shape, case.branches, plan.dropped, case.masks(), low_bit, ranks)
    out.backward(up)
    grads = {f"{i}.{n}": t.grad for i, w in enumerate(weights) for n, t in w.items() if t.grad is not None}
    return {"out": out.detach(), "x": x.grad, **grads}


def _model_shape(case: Case) -> ModelShape:
    config = {
        "num_hidden_layers": case.layers,
        "hidden_size": case.hidden,
        "intermediate_size": case.ffn,
        "num_attention_heads": case.heads,
        "num_key_value_heads": case.kv_groups,
        "rms_norm_eps": case.shape.eps,
        "rope_theta": case.shape.rope_theta,
        "attention_bias": case.biases,
        "max_position_embeddings": 64,
    }
    return ModelShape(LLAMA if case.gated else PLAIN, config, case.shape.head_dim)


def build_case(case: Case, runtime: Runtime) -> BlockUnit:
    """The unit of ``case`` on this rank, weights loaded, in training mode."""
    overrides = dict(case.overrides)
    if case.recompute:
        overrides |= {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
    if case.sequence_parallel:
        overrides["sequence_parallel"] = True
    schedules = [case.plan().block_schedule(i) for i in range(case.layers)]
    dtype = getattr(torch, case.dtype)
    unit = BlockUnit(_model_shape(case), schedules, runtime, dtype, hidden_dropout=case.dropout, **overrides)
    for i, weights in enumerate(case.weights()):
        unit.load_block(i, weights)
    if case.sequence_parallel:
        sum_gradients_in_backward(unit, runtime.tp_group)
    return unit


def forward(unit: BlockUnit, x: Tensor, case: Case) -> Tensor:
    """The unit's output for ``x`` [s, b, h]; this rank's part of it for its part of ``x``, cut along the sequence, if
    ``case`` is sequence parallel."""
    if not case.sequence_parallel:
        return unit(x)
    mask, rotary = unit._mask_and_rotary(case.length)
    return unit.blocks(x, attention_mask=mask, rotary_pos_emb=rotary)


def inputs(case: Case, runtime: Runtime) -> tuple[Tensor, Tensor]:
    """Input (a leaf) and upstream gradient as this rank gets them."""
    x, up = (t.to(getattr(torch, case.dtype)) for t in case.data())
    if case.sequence_parallel:
        x, up = (t.chunk(runtime.tp_size)[runtime.tp_rank] for t in (x, up))
    return x.clone().requires_grad_(), up


def megatron_result(case: Case, ranks: int) -> dict[str, Tensor]:
    """What :func:`reference_result` gives, by the Megatron layers on ``ranks`` ranks; the same on every rank
    (asserted)."""
    runtime = initialize(ranks, seed=5)
    unit = build_case(case, runtime)
    x, up = inputs(case, runtime)
    torch.manual_seed(77)
    tensor_parallel_seed(77)
    out = forward(unit, x, case)
    out.backward(up)
    result = {"out": out.detach(), "x": x.grad}
    for name, tensor in result.items():
        if case.sequence_parallel:
            result[name] = _gathered(tensor, runtime)
        else:
            _assert_same_on_all_ranks(name, tensor, runtime)
    return result | _full_grads(unit, case, runtime)


def _gathered(part: Tensor, runtime: Runtime) -> Tensor:
    parts: list[Any] = [None] * runtime.tp_size
    dist.all_gather_object(parts, part, group=runtime.tp_group)
    return torch.cat(parts)


def _full_grads(unit: BlockUnit, case: Case, runtime: Runtime) -> dict[str, Tensor]:
    full = {}
    for i, weights in enumerate(case.weights()):
        for p in unit.blocks.layers[i].parameters():
            p.data = p.grad if p.grad is not None else torch.zeros_like(p)
        shard = layer_shard(unit.blocks.layers[i], weights, unit.shape, unit.runtime)
        shard = {n: t.contiguous() for n, t in shard.items()}
        for name, tensor in shard.items():
            if LLAMA.tensor(name).dim is None:
                _assert_same_on_all_ranks(f"{i}.{name}", tensor, runtime)
        shards: list[Any] = [None] * runtime.tp_size
        dist.all_gather_object(shards, shard, group=runtime.tp_group)
        for name in filter(lambda n: LLAMA.tensor(n).unit == "branch", shard):
            _assert_same_inside_branches(f"{i}.{name}", [s[name] for s in shards], case.branches)
        full |= {f"{i}.{n}": t for n, t in unshard_block(shards, LLAMA, case.branches).items()}
    return full


def _assert_same_on_all_ranks(name: str, tensor: Tensor, runtime: Runtime) -> None:
    others: list[Any] = [None] * runtime.tp_size
    dist.all_gather_object(others, tensor, group=runtime.tp_group)
    for rank, other in enumerate(others):
        # Replicas that differ drift apart under an optimizer.
        assert torch.equal(other, tensor), f"{name} differs between rank {rank} and {runtime.tp_rank}"


def _assert_same_inside_branches(name: str, shards: list[Tensor], branches: int) -> None:
    copies = max(1, len(shards) // branches)
    for rank, shard in enumerate(shards):
        first = rank - rank % copies
        assert torch.equal(shard, shards[first]), (
            f"{name} differs between ranks {first} and {rank} of a branch"
        )
