"""The tables of a block: what checkpoints store, what Megatron-core has, what the rule adds. One for all families."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

#: What one step along the split axis is: a row of a query head, of a key/value head, an MLP neuron (of an expert, where
#: there are experts), a branch; or, along an axis that is not split, an expert.
Unit = Literal["query", "kv", "neuron", "branch", "expert"]

#: How Megatron-core lays out the parts of a parameter on one rank.
#: ``copy``: the one source as it is. ``stack``: the sources' slices one after the other (gate, up).
#: ``interleave_qkv``: for each key/value group its query heads, its key head, its value head.
Layout = Literal["copy", "stack", "interleave_qkv"]

#: The fields of ``BlockSettings`` that say whether a model has a bias.
Bias = Literal["qkv_bias", "output_bias", "mlp_bias"]


@dataclass(frozen=True)
class HFTensor:
    """A tensor of one block. ``name`` is relative to the block's prefix; ``dim``/``unit`` the axis that is split over
    branches and ranks (``dim`` None: replicated); ``size``: of the other axis of a matrix, or of a replicated vector.
    ``needs``: the setting with which a config has it. "{}" in a name stands for the number of an expert."""

    name: str
    dim: int | None = None
    unit: Unit | None = None
    needs: Bias | None = None
    size: Literal["hidden", "head"] = "hidden"

    def of_expert(self, number: int) -> HFTensor:
        """The entry for one expert."""
        return replace(self, name=self.name.format(number))


@dataclass(frozen=True)
class MegatronTensor:
    """A Megatron-core parameter of one transformer layer and the ``HFTensor`` names that make it. "{}" in the names
    stands for the number of an expert."""

    name: str
    sources: tuple[str, ...]
    layout: Layout = "copy"

    def of_expert(self, number: int) -> MegatronTensor:
        """The entry for one expert."""
        sources = tuple(source.format(number) for source in self.sources)
        return replace(self, name=self.name.format(number), sources=sources)


@dataclass(frozen=True)
class BranchTensor:
    """A vector for every branch, [G, h], that the dense model lacks: the rule's c_g, w_g and b_g (``layers/block.py``).

    ``name``: the parameter of ``SPDTransformerLayer``; ``source``: the block-relative Hugging Face name; ``flag``: the
    field of :class:`megatron_spd.plan.BlockPlan` by which a block has it. ``initial``: the value of all elements that
    changes nothing, from which training starts; None where the values have to be computed first (shifts).
    """

    name: str
    source: str
    flag: str
    initial: float | None = None


@dataclass(frozen=True)
class BlockTables:
    """A block as checkpoints store it, and as Megatron-core has it; ``qk_norm``, ``gated`` and ``experts`` as
    :func:`block_tables` was told."""

    stored: tuple[HFTensor, ...]
    megatron: tuple[MegatronTensor, ...]
    qk_norm: bool = False
    gated: bool = True
    experts: bool = False

    def of_experts(self, numbers: Iterable[int]) -> BlockTables:
        """The tables with an expert's entries written out once for each of ``numbers``."""
        numbers = tuple(numbers)
        return replace(
            self, stored=_written_out(self.stored, numbers), megatron=_written_out(self.megatron, numbers)
        )


def expert_number(name: str) -> int | None:
    """The expert that a tensor or parameter of a block belongs to; None: no expert."""
    found = _EXPERT.search(name)
    return None if found is None else int(found[1])


def expert_pattern(name: str) -> str:
    """``name`` with "{}" for the number of an expert."""
    return _EXPERT.sub(".{}.", name)


_EXPERT = re.compile(r"(?<=experts)\.(\d+)\.")
_Entry = TypeVar("_Entry", HFTensor, MegatronTensor)


def _written_out(entries: tuple[_Entry, ...], numbers: tuple[int, ...]) -> tuple[_Entry, ...]:
    return tuple(
        entry.of_expert(number) for entry in entries for number in (numbers if "{}" in entry.name else (0,))
    )


def block_tables(
    norm_bias: bool = False, qk_norm: bool = False, gated: bool = True, experts: bool = False
) -> BlockTables:
    """The tables of a block. ``norm_bias``: its norms have biases (LayerNorm); ``qk_norm``: query and key heads are
    normed; ``gated``: the MLP has a gate; ``experts``: there are several MLPs, and a router chooses among them."""
    norms = ("input_layernorm", "post_attention_layernorm")
    mlp, megatron_mlp = ("mlp.experts.{}", "mlp.experts.local_experts.{}") if experts else ("mlp", "mlp")
    into_mlp = (f"{mlp}.gate_proj", f"{mlp}.up_proj") if gated else (f"{mlp}.up_proj",)
    router = (("mlp.router", ("mlp.gate",), "copy"),) if experts else ()
    norm_kinds = ("weight", "bias") if norm_bias else ("weight",)
    head_norms = ("q_norm", "k_norm") if qk_norm else ()
    qkv: tuple[tuple[str, Unit], ...] = (("q_proj", "query"), ("k_proj", "kv"), ("v_proj", "kv"))
    stored = (
        *(HFTensor(f"{norms[0]}.{kind}") for kind in norm_kinds),
        *(HFTensor(f"self_attn.{name}.weight", 0, unit) for name, unit in qkv),
        HFTensor("self_attn.o_proj.weight", 1, "query"),
        *(HFTensor(f"self_attn.{name}.bias", 0, unit, needs="qkv_bias") for name, unit in qkv),
        HFTensor("self_attn.o_proj.bias", needs="output_bias"),
        *(HFTensor(f"self_attn.{name}.weight", size="head") for name in head_norms),
        *(HFTensor(f"{norms[1]}.{kind}") for kind in norm_kinds),
        *(HFTensor(f"{name}.weight", unit="expert") for _, (name,), _ in router),
        *(HFTensor(f"{name}.weight", 0, "neuron") for name in into_mlp),
        HFTensor(f"{mlp}.down_proj.weight", 1, "neuron"),
        *(HFTensor(f"{name}.bias", 0, "neuron", needs="mlp_bias") for name in into_mlp),
        HFTensor(f"{mlp}.down_proj.bias", needs="mlp_bias"),
    )
    parts: tuple[tuple[str, tuple[str, ...], Layout], ...] = (
        ("self_attention.linear_qkv", tuple(f"self_attn.{name}" for name, _ in qkv), "interleave_qkv"),
        ("self_attention.linear_proj", ("self_attn.o_proj",), "copy"),
        *router,
        (f"{megatron_mlp}.linear_fc1", into_mlp, "stack"),
        (f"{megatron_mlp}.linear_fc2", (f"{mlp}.down_proj",), "copy"),
    )
    megatron = (
        *(MegatronTensor(f"input_layernorm.{kind}", (f"{norms[0]}.{kind}",)) for kind in norm_kinds),
        *(MegatronTensor(f"pre_mlp_layernorm.{kind}", (f"{norms[1]}.{kind}",)) for kind in norm_kinds),
        *(
            MegatronTensor(f"{name}.{kind}", tuple(f"{source}.{kind}" for source in sources), layout)
            for name, sources, layout in parts
            for kind in ("weight", "bias")
        ),
        *(
            MegatronTensor(f"self_attention.{name[0]}_layernorm.weight", (f"self_attn.{name}.weight",))
            for name in head_norms
        ),
    )
    return BlockTables(stored, megatron, qk_norm, gated, experts)


#: Gated, with RMSNorm: the block of most families.
BLOCK = block_tables()

BRANCH_TENSORS = (
    BranchTensor("attention_shift", "self_attn.spd_shift", "attention_shift"),
    BranchTensor("attention_norm_weight", "self_attn.spd_norm_weight", "attention_norm", initial=1.0),
    BranchTensor("attention_norm_bias", "self_attn.spd_norm_bias", "attention_norm", initial=0.0),
    BranchTensor("mlp_shift", "mlp.spd_shift", "mlp_shift"),
    BranchTensor("mlp_norm_weight", "mlp.spd_norm_weight", "mlp_norm", initial=1.0),
    BranchTensor("mlp_norm_bias", "mlp.spd_norm_bias", "mlp_norm", initial=0.0),
)
