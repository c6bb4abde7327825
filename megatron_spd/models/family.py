"""What a model family is to this package: three declarative tables and a config mapping.

``HFTensor`` says how a Hugging Face tensor of a block is laid out over heads and neurons; permutation, tensor-parallel
slicing and gathering all follow from it. ``MegatronTensor`` says which of them make up a Megatron-core parameter.
``BranchTensor`` names what an SPD block may have and a dense one has not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megatron_spd.plan import BlockPlan

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
    branch_tensors: tuple[BranchTensor, ...]
    config_kwargs: Callable[[Mapping[str, Any]], dict[str, Any]]

    def tensor(self, name: str) -> HFTensor:
        """The table entry for a block-relative Hugging Face name (branch tensors included). Raises KeyError."""
        if any(name == entry.source for entry in self.branch_tensors):
            return HFTensor(name, 0, "branch", optional=True)
        for entry in self.hf_tensors:
            if entry.name == name:
                return entry
        raise KeyError(name)

    def planned_branch_tensors(self, block: BlockPlan) -> list[BranchTensor]:
        """The branch tensors that ``block`` has, in the table's order."""
        return [entry for entry in self.branch_tensors if getattr(block, entry.flag)]

    def block_name(self, block: int, name: str) -> str:
        """The full name of a block-relative tensor name."""
        return self.block_prefix.format(block) + name
