"""What a model family is to this package: two declarative tables and a config mapping.

``HFTensor`` says how a Hugging Face tensor of a block is laid out over heads and neurons; permutation, tensor-parallel
slicing and gathering all follow from it. ``MegatronTensor`` says which of them make up a Megatron-core parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

#: What one step along the split axis is: a row of a query head, of a key/value head, an MLP neuron, or a branch.
Unit = Literal["query", "kv", "neuron", "branch"]

#: How Megatron-core lays out the parts of a parameter on one rank.
#: ``copy``: the one source as it is. ``stack``: the sources' slices one after the other (gate, up).
#: ``interleave_qkv``: for each key/value group its query heads, its key head, its value head.
Layout = Literal["copy", "stack", "interleave_qkv"]


@dataclass(frozen=True)
class HFTensor:
    """A tensor of one block. ``name`` is relative to the block's prefix; ``dim``/``unit`` the axis that is split over
    branches and ranks (``dim`` None: replicated). ``optional``: some configs of the family do not have it."""

    name: str
    dim: int | None = None
    unit: Unit | None = None
    optional: bool = False


@dataclass(frozen=True)
class MegatronTensor:
    """A Megatron-core parameter of one transformer layer and the ``HFTensor`` names that make it."""

    name: str
    sources: tuple[str, ...]
    layout: Layout = "copy"


@dataclass(frozen=True)
class ModelFamily:
    """One family of models.

    ``config_kwargs`` maps a Hugging Face config (as a dict) to keyword arguments of Megatron-core's
    ``TransformerConfig``; it raises UserError for a setting that the family does not cover.
    """

    model_type: str
    spd_model_type: str
    block_prefix: str
    hf_tensors: tuple[HFTensor, ...]
    megatron_tensors: tuple[MegatronTensor, ...]
    embedding: str
    final_norm: str
    output_layer: str
    attention_shift: str
    mlp_shift: str
    config_kwargs: Callable[[Mapping[str, Any]], dict[str, Any]]

    def tensor(self, name: str) -> HFTensor:
        """The table entry for a block-relative Hugging Face name (shifts included). Raises KeyError."""
        if name in (self.attention_shift, self.mlp_shift):
            return HFTensor(name, 0, "branch", optional=True)
        for entry in self.hf_tensors:
            if entry.name == name:
                return entry
        raise KeyError(name)

    def block_name(self, block: int, name: str) -> str:
        """The full name of a block-relative tensor name."""
        return self.block_prefix.format(block) + name
