"""The SPD layer's linears by Transformer Engine (its matrix multiplies, FP8 included), for one branch on a rank.

As in ``linear.py`` the layer in ``block.py`` owns the collectives, and these linears have none, in either direction.
Megatron-core's classes leave them out where it tells them that a linear is an expert's, whose tokens others move: that
is the switch used here. What it changes besides (marks on the parameters) is set back.

Norms stay PyTorch's: the rule hands a norm its parameters as tensors (summed over ranks in the backward pass, scaled by
a branch norm), which a module that runs Transformer Engine's kernels on parameters of its own does not take. Hence no
fused norm and linear inside SPD layers; checkpoints have the names of the fused ones all the same.

Importable without Transformer Engine: Megatron-core then has stand-ins in the place of its classes, and
:func:`check_transformer_engine` refuses to use them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron.core.extensions.transformer_engine import (
    HAVE_TE,
    TEColumnParallelLinear,
    TEDotProductAttention,
    TENorm,
    TERowParallelLinear,
)
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_spd.errors import UserError
from megatron_spd.plan import BlockSchedule

__all__ = [
    "TEBranchColumnParallelLinear",
    "TEDotProductAttention",
    "TENorm",
    "TEPartialRowParallelLinear",
    "check_transformer_engine",
    "stock_layer_spec",
]


class TEBranchColumnParallelLinear(TEColumnParallelLinear):
    """Column-parallel linear whose input is the rank's branch's own, and whose input gradient is a partial sum."""

    def __init__(self, *args: Any, stride: int = 1, **kwargs: Any) -> None:
        super().__init__(*args, **(kwargs | {"stride": stride, "is_expert": True}))
        for parameter in self.parameters(recurse=False):
            _mark(parameter, dim=0, stride=stride)

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """[1, s, b, h] -> ([s, b, out / M], bias where it is not added)."""
        return super().forward(input_[0], *args, **kwargs)


class TEPartialRowParallelLinear(TERowParallelLinear):
    """Row-parallel linear that returns the rank's partial sum instead of reducing it."""

    def __init__(self, *args: Any, config: TransformerConfig, **kwargs: Any) -> None:
        super().__init__(*args, config=config, **(kwargs | {"is_expert": True}))
        for name, parameter in self.named_parameters(recurse=False):
            if name == "bias":
                parameter.allreduce = True
                parameter.sequence_parallel = config.sequence_parallel
            else:
                _mark(parameter, dim=1, stride=1)

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """[s, b, in / M] -> ([1, s, b, h] partial sum, bias); the bias is not added."""
        partial, bias = super().forward(input_)
        return partial.unsqueeze(0), bias


def _mark(parameter: nn.Parameter, dim: int, stride: int) -> None:
    """Mark a parameter sharded over ``dim`` as Megatron-core's dense linears do: reduced over all data-parallel ranks,
    counted in gradient norms on every tensor-parallel rank."""
    marks = {
        "allreduce": True,
        "tensor_model_parallel": True,
        "partition_dim": dim,
        "partition_stride": stride,
    }
    for name, value in marks.items():
        setattr(parameter, name, value)


def stock_layer_spec(config: TransformerConfig) -> ModuleSpec:
    """Megatron-core's own layer of Transformer Engine modules, for blocks in which nothing is dropped."""
    return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)


def check_transformer_engine(
    config: TransformerConfig, schedules: Sequence[BlockSchedule], fused_attention: bool
) -> None:
    """Raise UserError where Transformer Engine is missing, and for what these specs do not cover."""
    if not HAVE_TE:
        raise UserError(
            "use_transformer_engine = True, but Transformer Engine is not installed; install transformer-engine for "
            "this machine's CUDA (pip install transformer-engine[pytorch]), or leave use_transformer_engine out"
        )
    ranks = config.tensor_model_parallel_size
    if any(ranks < s.branches for s in schedules):
        raise UserError(
            f"Transformer Engine's linears compute one branch on a rank, and M = {ranks} ranks are fewer than G = "
            f"{schedules[0].branches} branches; use M >= G, or leave use_transformer_engine out"
        )
    unsupported = {
        "fused_attention (Transformer Engine's own takes its place)": fused_attention,
        "num_moe_experts": config.num_moe_experts is not None,
        "tp_comm_overlap": config.tp_comm_overlap,
        "layernorm_zero_centered_gamma": config.layernorm_zero_centered_gamma,
        "gtp_weight_remat_size": getattr(config, "gtp_weight_remat_size", 1) > 1,  # of 0.19
    }
    for name, given in unsupported.items():
        if given:
            raise UserError(
                f"use_transformer_engine does not go together with {name}; switch one of them off"
            )
