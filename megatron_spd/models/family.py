"""What a model family is to this package: names, a few choices and declarative tables.

Inside the package the tensors of a block go by one set of names for all families, those of a Hugging Face Llama
(``self_attn.q_proj.weight``, ``mlp.down_proj.bias``, ...); a family whose checkpoints call them otherwise says so in
``stored_names``. ``HFTensor`` says how a tensor of a block is laid out over heads and neurons; permutation,
tensor-parallel slicing and gathering all follow from it. ``MegatronTensor`` says which of them make up a Megatron-core
parameter. ``BranchTensor`` names what an SPD block may have and a dense one has not. ``tables.py`` has the tables.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from megatron_spd.models.norm import NormKind
from megatron_spd.models.tables import (
    BLOCK,
    BRANCH_TENSORS,
    BlockTables,
    BranchTensor,
    HFTensor,
    expert_number,
    expert_pattern,
)
from megatron_spd.plan import BlockPlan

Activation = Literal["silu", "relu"]

#: Parameters of a GPTModel that belong to no block.
EMBEDDING = "embedding.word_embeddings.weight"
POSITIONS = "embedding.position_embeddings.weight"
FINAL_NORM, FINAL_NORM_BIAS = "decoder.final_layernorm.weight", "decoder.final_layernorm.bias"
OUTPUT_LAYER = "output_layer.weight"


@dataclass(frozen=True)
class Experts:
    """``count`` MLPs, of which a router chooses ``chosen`` for each token; ``renormalised``: the weights of those
    chosen add up to 1."""

    count: int
    chosen: int
    renormalised: bool = True


@dataclass(frozen=True)
class BlockSettings:
    """What a ``config.json`` says about a block beside its sizes.

    ``norm_eps``: of all norms. ``qkv_bias``, ``output_bias``, ``mlp_bias``: which projections have biases (q, k and v;
    o; all of the MLP). ``window``: keys that a query sees, its own included; None: all before it. ``experts`` None: one
    MLP.
    """

    norm_eps: float
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    window: int | None = None
    experts: Experts | None = None


@dataclass(frozen=True)
class LearnedPositions:
    """A table of position embeddings: the tensor's full ``name``; position 0 is row ``offset``."""

    name: str
    offset: int = 0


@dataclass(frozen=True)
class OuterTensor:
    """A tensor that belongs to no block: its full ``name`` and the GPTModel's ``parameter``.

    ``vocabulary``: it has a row for every token, split over the tensor-parallel ranks. ``offset``: first rows that
    Megatron-core's table lacks.
    """

    name: str
    parameter: str
    vocabulary: bool = False
    offset: int = 0

    @property
    def in_front(self) -> bool:
        """Whether it stands in front of the blocks, on the first pipeline stage; else on the last."""
        return self.parameter.startswith("embedding.")


@dataclass(frozen=True)
class ModelFamily:
    """One family of models.

    ``settings`` reads a Hugging Face config (as a dict); it raises UserError for a setting that the family does not
    cover. ``classes``: transformers' classes are ``<classes>Config`` and ``<classes>ForCausalLM``. ``tied``: whether
    the output layer is the embedding, and ``head_dim`` the size of a head, where a config does not say (None: the
    hidden size shared out over the heads). ``ffn_key``: the config's name for the number of MLP neurons.
    ``positions`` None: rotary. ``stored_names``: modules of a block that its checkpoints call otherwise; "{}" in both
    stands for the number of an expert.
    """

    model_type: str
    classes: str
    settings: Callable[[Mapping[str, Any]], BlockSettings]
    tables: BlockTables = BLOCK
    norm: NormKind = "RMSNorm"
    activation: Activation = "silu"
    positions: LearnedPositions | None = None
    block_prefix: str = "model.layers.{}."
    embedding: str = "model.embed_tokens.weight"
    final_norm: str = "model.norm.weight"
    output_layer: str = "lm_head.weight"
    tied: bool = False
    head_dim: int | None = None
    ffn_key: str = "intermediate_size"
    stored_names: Mapping[str, str] = field(default_factory=dict)
    branch_tensors: tuple[BranchTensor, ...] = BRANCH_TENSORS

    @property
    def spd_model_type(self) -> str:
        """The ``model_type`` of the family's exports."""
        return f"spd_{self.model_type}"

    @property
    def final_norm_bias(self) -> str | None:
        """The full name of the final norm's bias, if it has one."""
        return self.final_norm.removesuffix("weight") + "bias" if self.norm == "LayerNorm" else None

    def is_tied(self, hf: Mapping[str, Any]) -> bool:
        """Whether the output layer is the embedding."""
        return bool(hf.get("tie_word_embeddings", self.tied))

    def outer_tensors(self, tied: bool) -> list[OuterTensor]:
        """What belongs to no block; ``tied``: the output layer is the embedding."""
        tensors = [OuterTensor(self.embedding, EMBEDDING, vocabulary=True)]
        if self.positions is not None:
            tensors.append(OuterTensor(self.positions.name, POSITIONS, offset=self.positions.offset))
        tensors.append(OuterTensor(self.final_norm, FINAL_NORM))
        if self.final_norm_bias is not None:
            tensors.append(OuterTensor(self.final_norm_bias, FINAL_NORM_BIAS))
        if not tied:
            tensors.append(OuterTensor(self.output_layer, OUTPUT_LAYER, vocabulary=True))
        return tensors

    def block_tensors(self, settings: BlockSettings) -> list[HFTensor]:
        """The table's entries that a model with ``settings`` has."""
        stored = self.written_out(settings).stored
        return [t for t in stored if t.needs is None or getattr(settings, t.needs)]

    def written_out(self, settings: BlockSettings) -> BlockTables:
        """The tables with all experts of a model with ``settings``."""
        return self.tables.of_experts(range(0 if settings.experts is None else settings.experts.count))

    def tensor(self, name: str) -> HFTensor:
        """The table entry for a block-relative name (branch tensors included). Raises KeyError."""
        if any(name == entry.source for entry in self.branch_tensors):
            return HFTensor(name, 0, "branch")
        for entry in self.tables.stored:
            if entry.name == expert_pattern(name):
                return replace(entry, name=name)
        raise KeyError(name)

    def planned_branch_tensors(self, block: BlockPlan) -> list[BranchTensor]:
        """The branch tensors that ``block`` has, in the table's order."""
        return [entry for entry in self.branch_tensors if getattr(block, entry.flag)]

    def block_name(self, block: int, name: str) -> str:
        """The full name, in a checkpoint, of a block-relative tensor name."""
        module, _, kind = name.rpartition(".")
        pattern = expert_pattern(f"{module}.").removesuffix(".")
        stored = self.stored_names.get(pattern, pattern).format(expert_number(f"{module}."))
        return self.block_prefix.format(block) + f"{stored}.{kind}"
