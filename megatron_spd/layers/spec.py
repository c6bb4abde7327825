"""The layer spec: ``GPTModel(config, get_gpt_layer_spd_spec(config, plan), ...)`` is an SPD model."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch.distributed import ProcessGroup

from megatron_spd.collective import FULL
from megatron_spd.errors import UserError
from megatron_spd.layers import transformer_engine as te
from megatron_spd.layers.attention import FusedCausalAttention
from megatron_spd.layers.block import SPDTransformerLayer
from megatron_spd.layers.linear import BranchColumnParallelLinear, PartialRowParallelLinear
from megatron_spd.layers.moe import BranchMoE, unsupported_expert_settings
from megatron_spd.layers.norm import HeadNorm, MarkedTorchNorm
from megatron_spd.plan import BlockSchedule, SPDPlan
from megatron_spd.runtime.branch_groups import branch_process_group


def get_gpt_layer_spd_spec(
    config: TransformerConfig,
    plan: SPDPlan,
    fused_attention: bool = False,
    vp_stage: int | None = None,
    use_transformer_engine: bool = False,
) -> TransformerBlockSubmodules:
    """One layer spec per block of ``plan`` that this rank has: the stock spec where nothing is dropped, pending or
    low-bit, the SPD layer elsewhere.

    ``config.tensor_model_parallel_size`` is M; each rank computes G / M branches, or a part of one with the other ranks
    of its branch (M > G: all ranks must call this, after Megatron-core's groups exist). ``fused_attention``: with
    :class:`FusedCausalAttention`, for evaluation and inference. ``vp_stage``: the model chunk, under interleaved
    pipeline parallelism. ``use_transformer_engine``: with Transformer Engine's linears and attention, where it is
    installed (one branch on a rank: M >= G); these specs have never run on a GPU.

    Between pipeline stages only X is sent: what is pending at a stage's end is synced there, so that a dropped MLP
    point becomes a kept one (with a warning, for the model then computes another function; see
    :func:`pipeline_plan`).

    Raises UserError for an M that is no case of method section 8, and for Megatron-core settings under which the rule
    is not implemented.
    """
    plan.check_ranks(config.tensor_model_parallel_size)
    if config.num_layers != plan.num_layers:
        raise UserError(
            f"the config has num_layers = {config.num_layers}, the plan is for {plan.num_layers} blocks"
        )
    _branch_group(config, plan.branches)  # made by all ranks, whichever blocks they have
    blocks = stage_blocks(config, vp_stage)
    last = 2 * blocks.stop - 1
    if last in plan.dropped:
        warnings.warn(
            f"the plan drops sync point {last}, but a pipeline stage ends there: it is synced, and the model computes "
            "another function than on one stage; let stages end at kept points",
            stacklevel=2,
        )
    cut = plan.synced_behind({blocks.start - 1, blocks.stop - 1})
    schedules = [cut.block_schedule(i) for i in blocks]
    return block_submodules(config, schedules, fused_attention, use_transformer_engine)


def stage_blocks(config: TransformerConfig, vp_stage: int | None = None) -> range:
    """The blocks of this rank's pipeline stage (and model chunk ``vp_stage``), however ``config`` divides them."""
    if config.pipeline_model_parallel_size == 1:
        return range(config.num_layers)
    first = get_transformer_layer_offset(config, vp_stage)
    return range(first, first + get_num_layers_to_build(config, vp_stage))


def pipeline_plan(config: TransformerConfig, plan: SPDPlan, group: ProcessGroup) -> SPDPlan:
    """``plan`` with the points kept that pipeline stages sync: the function that the pipeline computes, and the plan
    under which weights trained in it are to be exported. A collective of the pipeline-parallel ``group``."""
    chunks = config.virtual_pipeline_model_parallel_size
    stages = [None] if chunks is None else range(chunks)
    mine = [stage_blocks(config, stage).stop - 1 for stage in stages]
    ends: list[list[int]] = [mine] * group.size()
    if group.size() > 1:
        dist.all_gather_object(ends, mine, group=group)
    return plan.synced_behind({block for stage in ends for block in stage})


def block_submodules(
    config: TransformerConfig,
    schedules: list[BlockSchedule],
    fused_attention: bool = False,
    use_transformer_engine: bool = False,
) -> TransformerBlockSubmodules:
    """Specs for a run of blocks, one per schedule (a whole model, or the unit that is being distilled).

    ``fused_attention``: with :class:`FusedCausalAttention`, for evaluation. ``use_transformer_engine``: as in
    :func:`get_gpt_layer_spd_spec`.
    """
    _check_config(config)
    if config.sequence_parallel:
        _check_sequence_parallel(config, schedules)
    # Megatron-core's own layer with experts trains on several ranks under sequence parallelism only: not used.
    experts = config.num_moe_experts is not None
    if experts and any(config.tensor_model_parallel_size > s.branches for s in schedules):
        raise UserError(
            f"experts with M = {config.tensor_model_parallel_size} ranks for G = {schedules[0].branches} branches are "
            "not supported; use M <= G"
        )
    if use_transformer_engine:
        te.check_transformer_engine(config, schedules, fused_attention)
        return _transformer_engine_submodules(config, schedules)
    stock = _stock_spec(config)
    if fused_attention:
        stock = _with_attention(stock, core_attention=FusedCausalAttention)
    return TransformerBlockSubmodules(
        layer_specs=[stock if s.is_stock and not experts else _spd_spec(config, stock, s) for s in schedules],
        layer_norm=stock.submodules.input_layernorm,
    )


def _transformer_engine_submodules(
    config: TransformerConfig, schedules: list[BlockSchedule]
) -> TransformerBlockSubmodules:
    """Blocks with nothing dropped are Megatron-core's own Transformer Engine layers. SPD layers have the frame of the
    local layer, whose norms stand by themselves, and Transformer Engine's attention and linears."""
    stock = te.stock_layer_spec(config)
    if config.qk_layernorm:
        stock = _with_attention(stock, q_layernorm=HeadNorm, k_layernorm=HeadNorm)
    frame = _with_attention(_with_marked_norms(_stock_spec(config)), core_attention=te.TEDotProductAttention)
    return TransformerBlockSubmodules(
        layer_specs=[
            stock if s.is_stock else _spd_spec(config, frame, s, transformer_engine=True) for s in schedules
        ],
        layer_norm=te.TENorm,
    )


def _check_config(config: TransformerConfig) -> None:
    recompute = config.recompute_modules if config.recompute_granularity == "selective" else []
    unsupported = {
        "multi_latent_attention": config.multi_latent_attention,
        "fp32_residual_connection": config.fp32_residual_connection,
        "recompute_modules other than core_attn": bool(set(recompute or []) - {"core_attn"}),
        **unsupported_expert_settings(config),
    }
    for name, given in unsupported.items():
        if given:
            raise UserError(
                f"the SPD layer does not support Megatron-core's {name}; switch it off in the config"
            )
    if config.context_parallel_size > 1:
        raise UserError(
            f"context_parallel_size = {config.context_parallel_size}: Megatron-core's attention over a sequence that "
            "ranks share is Transformer Engine's, in which SPD layers have never run; set it to 1"
        )


def _check_sequence_parallel(config: TransformerConfig, schedules: list[BlockSchedule]) -> None:
    """Raise UserError for what has no reduce-scatter of its own."""
    if config.num_moe_experts is not None:
        raise UserError("sequence_parallel with experts is not supported; switch sequence_parallel off")
    if any(config.tensor_model_parallel_size > s.branches for s in schedules):
        raise UserError(
            f"sequence_parallel with M = {config.tensor_model_parallel_size} ranks for G = {schedules[0].branches} "
            "branches is not supported; switch sequence_parallel off, or use M <= G"
        )
    if any({s.attention_collective, s.mlp_collective} != {FULL} for s in schedules):
        raise UserError(
            "the plan has low-bit sync points, which are all-reduces; switch Megatron-core's sequence_parallel off"
        )


def _branch_group(config: TransformerConfig, branches: int) -> ProcessGroup | None:
    """The ranks of this rank's branch for M > G. Only there does the spec need process groups."""
    if config.tensor_model_parallel_size <= branches:
        return None
    return branch_process_group(branches, parallel_state.get_tensor_model_parallel_group())


def _stock_spec(config: TransformerConfig) -> ModuleSpec:
    stock = get_gpt_layer_local_spec(normalization=config.normalization, qk_layernorm=config.qk_layernorm)
    if config.qk_layernorm:
        stock = _with_attention(stock, q_layernorm=HeadNorm, k_layernorm=HeadNorm)
    return _with_marked_norms(stock) if config.sequence_parallel else stock


def _with_marked_norms(stock: ModuleSpec) -> ModuleSpec:
    """``stock`` with :class:`MarkedTorchNorm` where it has the norm that refuses sequence parallelism."""

    def marked(submodules: Any) -> Any:
        fields = {f.name: getattr(submodules, f.name) for f in dataclasses.fields(submodules)}
        norms = {n: MarkedTorchNorm for n, module in fields.items() if module is WrappedTorchNorm}
        return dataclasses.replace(submodules, **norms)

    layer = marked(stock.submodules)
    attention = dataclasses.replace(layer.self_attention, submodules=marked(layer.self_attention.submodules))
    return dataclasses.replace(stock, submodules=dataclasses.replace(layer, self_attention=attention))


def _with_attention(stock: ModuleSpec, **submodules: Any) -> ModuleSpec:
    """``stock`` with other ``submodules`` in its self attention."""
    attention = stock.submodules.self_attention
    attention = dataclasses.replace(
        attention, submodules=dataclasses.replace(attention.submodules, **submodules)
    )
    return dataclasses.replace(
        stock, submodules=dataclasses.replace(stock.submodules, self_attention=attention)
    )


def _spd_spec(
    config: TransformerConfig, stock: ModuleSpec, schedule: BlockSchedule, transformer_engine: bool = False
) -> ModuleSpec:
    branches = max(1, schedule.branches // config.tensor_model_parallel_size)
    # A single process keeps branches apart at a low-bit point too, to round them as G ranks would.
    alone = config.tensor_model_parallel_size == 1
    attention_apart = schedule.drop_attention or (alone and schedule.attention_collective != FULL)
    mlp_apart = schedule.drop_mlp or (alone and schedule.mlp_collective != FULL)

    def column() -> ModuleSpec:
        if transformer_engine:
            return ModuleSpec(te.TEBranchColumnParallelLinear)
        return ModuleSpec(BranchColumnParallelLinear, params={"local_branches": branches})

    def row(per_branch: bool) -> ModuleSpec:
        if transformer_engine:
            return ModuleSpec(te.TEPartialRowParallelLinear)
        return ModuleSpec(
            PartialRowParallelLinear, params={"local_branches": branches, "per_branch": per_branch}
        )

    stock = _with_attention(stock, linear_qkv=column(), linear_proj=row(attention_apart))
    if config.num_moe_experts is None:
        # Made anew: newer versions of Megatron-core hide the stock one in a partial function.
        mlp = ModuleSpec(MLP, submodules=MLPSubmodules(linear_fc1=column(), linear_fc2=row(mlp_apart)))
    else:
        mlp = _moe_spec(schedule, branches, mlp_apart)
    return ModuleSpec(
        module=SPDTransformerLayer,
        params={"schedule": schedule, "branch_group": _branch_group(config, schedule.branches)},
        submodules=dataclasses.replace(stock.submodules, mlp=mlp),
    )


def _moe_spec(schedule: BlockSchedule, branches: int, apart: bool) -> ModuleSpec:
    """Router and experts for ``branches`` on this rank, whose outputs are kept ``apart``."""
    # Branches that read the same and whose outputs are added are one to the experts.
    runs = {"local_branches": branches if apart or schedule.mlp_inputs_differ else 1}
    return ModuleSpec(
        module=BranchMoE,
        params={
            **runs,
            "per_branch": apart,
            "one_router": schedule.routing == "first" and schedule.mlp_inputs_differ,
        },
        submodules=MLPSubmodules(
            linear_fc1=ModuleSpec(BranchColumnParallelLinear, params=runs),
            linear_fc2=ModuleSpec(PartialRowParallelLinear, params={**runs, "per_branch": apart}),
        ),
    )
