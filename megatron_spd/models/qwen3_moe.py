"""Qwen3-MoE: a Qwen3 with experts in every block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_spd.errors import UserError
from megatron_spd.models.family import BlockSettings, ModelFamily
from megatron_spd.models.reading import expect, experts_of, positive_number, window_of_some_blocks
from megatron_spd.models.tables import block_tables


def _settings(hf: Mapping[str, Any]) -> BlockSettings:
    expect(hf, hidden_act="silu", attention_bias=False, decoder_sparse_step=1)
    if hf.get("mlp_only_layers"):
        raise UserError(
            f"blocks {hf['mlp_only_layers']} of this qwen3_moe have a plain MLP (mlp_only_layers); only models with "
            "experts in every block are supported"
        )
    # transformers writes its own name of the setting, the published configs have the other one.
    name = "num_experts" if "num_experts" in hf else "num_local_experts"
    experts = experts_of(hf, name, count=128, chosen=8, renormalised=bool(hf.get("norm_topk_prob")))
    return BlockSettings(
        positive_number(hf, "rms_norm_eps"), window=window_of_some_blocks(hf), experts=experts
    )


QWEN3_MOE = ModelFamily(
    model_type="qwen3_moe",
    classes="Qwen3Moe",
    settings=_settings,
    tables=block_tables(qk_norm=True, experts=True),
    ffn_key="moe_intermediate_size",
)
