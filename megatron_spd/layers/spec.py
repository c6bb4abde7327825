"""The layer spec: ``GPTModel(config, get_gpt_layer_spd_spec(config, plan), ...)`` is an SPD model."""

from __future__ import annotations

import dataclasses

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_spd.collective import FULL
from megatron_spd.errors import UserError
from megatron_spd.layers.attention import FusedCausalAttention
from megatron_spd.layers.block import SPDTransformerLayer
from megatron_spd.layers.linear import BranchColumnParallelLinear, PartialRowParallelLinear
from megatron_spd.plan import BlockSchedule, SPDPlan


def get_gpt_layer_spd_spec(
    config: TransformerConfig, plan: SPDPlan, fused_attention: bool = False
) -> TransformerBlockSubmodules:
    """One layer spec per block of ``plan``: the stock spec where nothing is dropped, pending or low-bit, the
    SPD layer elsewhere.

    ``config.tensor_model_parallel_size`` is M; each rank computes G / M branches. ``fused_attention``: with
    :class:`FusedCausalAttention`, for evaluation and inference. Raises UserError for an M that does
    not divide G, and for Megatron-core settings under which the rule is not implemented.
    """
    schedules = [plan.block_schedule(i) for i in range(plan.num_layers)]
    plan.check_ranks(config.tensor_model_parallel_size)
    if config.num_layers != plan.num_layers:
        raise UserError(
            f"the config has num_layers = {config.num_layers}, the plan is for {plan.num_layers} blocks"
        )
    return block_submodules(config, schedules, fused_attention)


def block_submodules(
    config: TransformerConfig, schedules: list[BlockSchedule], fused_attention: bool = False
) -> TransformerBlockSubmodules:
    """Specs for a run of blocks, one per schedule (a whole model, or the unit that is being distilled).

    ``fused_attention``: with :class:`FusedCausalAttention`, for evaluation.
    """
    _check_config(config)
    stock = _stock_spec(config)
    if fused_attention:
        stock = _with_fused_attention(stock)
    return TransformerBlockSubmodules(
        layer_specs=[stock if s.is_stock else _spd_spec(config, stock, s) for s in schedules],
        layer_norm=stock.submodules.input_layernorm,
    )


def _check_config(config: TransformerConfig) -> None:
    recompute = config.recompute_modules if config.recompute_granularity == "selective" else []
    unsupported = {
        "sequence_parallel": config.sequence_parallel,
        "pipeline_model_parallel_size > 1": config.pipeline_model_parallel_size > 1,
        "context_parallel_size > 1": config.context_parallel_size > 1,
        "num_moe_experts": config.num_moe_experts is not None,
        "multi_latent_attention": config.multi_latent_attention,
        "fp32_residual_connection": config.fp32_residual_connection,
        "recompute_modules other than core_attn": bool(set(recompute or []) - {"core_attn"}),
    }
    for name, given in unsupported.items():
        if given:
            raise UserError(
                f"the SPD layer does not support Megatron-core's {name}; switch it off in the config"
            )


def _stock_spec(config: TransformerConfig) -> ModuleSpec:
    return get_gpt_layer_local_spec(normalization=config.normalization, qk_layernorm=config.qk_layernorm)


def _with_fused_attention(stock: ModuleSpec) -> ModuleSpec:
    attention = stock.submodules.self_attention
    fused = dataclasses.replace(attention.submodules, core_attention=FusedCausalAttention)
    attention = dataclasses.replace(attention, submodules=fused)
    return dataclasses.replace(
        stock, submodules=dataclasses.replace(stock.submodules, self_attention=attention)
    )


def _spd_spec(config: TransformerConfig, stock: ModuleSpec, schedule: BlockSchedule) -> ModuleSpec:
    branches = schedule.branches // config.tensor_model_parallel_size
    # A single process keeps branches apart at a low-bit point too, to round them as G ranks would.
    alone = config.tensor_model_parallel_size == 1
    attention_apart = schedule.drop_attention or (alone and schedule.attention_collective != FULL)
    mlp_apart = schedule.drop_mlp or (alone and schedule.mlp_collective != FULL)

    def column() -> ModuleSpec:
        return ModuleSpec(BranchColumnParallelLinear, params={"local_branches": branches})

    def row(per_branch: bool) -> ModuleSpec:
        return ModuleSpec(
            PartialRowParallelLinear, params={"local_branches": branches, "per_branch": per_branch}
        )

    layer, attention, mlp = stock.submodules, stock.submodules.self_attention, stock.submodules.mlp
    attention = dataclasses.replace(
        attention,
        submodules=dataclasses.replace(
            attention.submodules,
            linear_qkv=column(),
            linear_proj=row(attention_apart),
        ),
    )
    mlp = dataclasses.replace(
        mlp,
        submodules=dataclasses.replace(
            mlp.submodules,
            linear_fc1=column(),
            linear_fc2=row(mlp_apart),
        ),
    )
    return ModuleSpec(
        module=SPDTransformerLayer,
        params={"schedule": schedule},
        submodules=dataclasses.replace(layer, self_attention=attention, mlp=mlp),
    )
