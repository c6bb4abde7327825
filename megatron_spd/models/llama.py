"""Llama 2 / 3.x (and SmolLM2, which is a Llama)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_spd.errors import UserError
from megatron_spd.models.family import BranchTensor, HFTensor, MegatronTensor, ModelFamily


def _config_kwargs(hf: Mapping[str, Any]) -> dict[str, Any]:
    import torch.nn.functional as F

    if hf.get("hidden_act", "silu") != "silu":
        raise UserError(
            f"hidden_act = {hf['hidden_act']!r} in a llama config; this family is known with 'silu' only"
        )
    return {
        "normalization": "RMSNorm",
        "layernorm_epsilon": hf["rms_norm_eps"],
        "gated_linear_unit": True,
        "activation_func": F.silu,
        # Megatron has one switch for all biases; a bias that the checkpoint lacks is loaded as zero.
        "add_bias_linear": bool(hf.get("attention_bias")) or bool(hf.get("mlp_bias")),
    }


LLAMA = ModelFamily(
    model_type="llama",
    spd_model_type="spd_llama",
    block_prefix="model.layers.{}.",
    hf_tensors=(
        HFTensor("input_layernorm.weight"),
        HFTensor("self_attn.q_proj.weight", 0, "query"),
        HFTensor("self_attn.k_proj.weight", 0, "kv"),
        HFTensor("self_attn.v_proj.weight", 0, "kv"),
        HFTensor("self_attn.o_proj.weight", 1, "query"),
        HFTensor("self_attn.q_proj.bias", 0, "query", optional=True),
        HFTensor("self_attn.k_proj.bias", 0, "kv", optional=True),
        HFTensor("self_attn.v_proj.bias", 0, "kv", optional=True),
        HFTensor("self_attn.o_proj.bias", optional=True),
        HFTensor("post_attention_layernorm.weight"),
        HFTensor("mlp.gate_proj.weight", 0, "neuron"),
        HFTensor("mlp.up_proj.weight", 0, "neuron"),
        HFTensor("mlp.down_proj.weight", 1, "neuron"),
        HFTensor("mlp.gate_proj.bias", 0, "neuron", optional=True),
        HFTensor("mlp.up_proj.bias", 0, "neuron", optional=True),
        HFTensor("mlp.down_proj.bias", optional=True),
    ),
    megatron_tensors=(
        MegatronTensor("input_layernorm.weight", ("input_layernorm.weight",)),
        MegatronTensor(
            "self_attention.linear_qkv.weight",
            ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
            "interleave_qkv",
        ),
        MegatronTensor(
            "self_attention.linear_qkv.bias",
            ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
            "interleave_qkv",
        ),
        MegatronTensor("self_attention.linear_proj.weight", ("self_attn.o_proj.weight",)),
        MegatronTensor("self_attention.linear_proj.bias", ("self_attn.o_proj.bias",)),
        MegatronTensor("pre_mlp_layernorm.weight", ("post_attention_layernorm.weight",)),
        MegatronTensor("mlp.linear_fc1.weight", ("mlp.gate_proj.weight", "mlp.up_proj.weight"), "stack"),
        MegatronTensor("mlp.linear_fc1.bias", ("mlp.gate_proj.bias", "mlp.up_proj.bias"), "stack"),
        MegatronTensor("mlp.linear_fc2.weight", ("mlp.down_proj.weight",)),
        MegatronTensor("mlp.linear_fc2.bias", ("mlp.down_proj.bias",)),
    ),
    embedding="model.embed_tokens.weight",
    final_norm="model.norm.weight",
    output_layer="lm_head.weight",
    branch_tensors=(
        BranchTensor("attention_shift", "self_attn.spd_shift", "attention_shift"),
        BranchTensor("attention_norm_weight", "self_attn.spd_norm_weight", "attention_norm", initial=1.0),
        BranchTensor("attention_norm_bias", "self_attn.spd_norm_bias", "attention_norm", initial=0.0),
        BranchTensor("mlp_shift", "mlp.spd_shift", "mlp_shift"),
        BranchTensor("mlp_norm_weight", "mlp.spd_norm_weight", "mlp_norm", initial=1.0),
        BranchTensor("mlp_norm_bias", "mlp.spd_norm_bias", "mlp_norm", initial=0.0),
    ),
    config_kwargs=_config_kwargs,
)
