"""Mixtral: a Mistral with experts, called w1 (gate), w2 (down) and w3 (up)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_spd.models.family import BlockSettings, ModelFamily
from megatron_spd.models.reading import expect, experts_of, positive_number
from megatron_spd.models.tables import block_tables


def _settings(hf: Mapping[str, Any]) -> BlockSettings:
    expect(hf, hidden_act="silu", router_jitter_noise=0.0)
    eps, experts = positive_number(hf, "rms_norm_eps"), experts_of(hf, "num_local_experts", count=8, chosen=2)
    return BlockSettings(eps, window=hf.get("sliding_window"), experts=experts)


MIXTRAL = ModelFamily(
    model_type="mixtral",
    classes="Mixtral",
    settings=_settings,
    tables=block_tables(experts=True),
    stored_names={
        "mlp": "block_sparse_moe",
        "mlp.gate": "block_sparse_moe.gate",
        "mlp.experts.{}.gate_proj": "block_sparse_moe.experts.{}.w1",
        "mlp.experts.{}.down_proj": "block_sparse_moe.experts.{}.w2",
        "mlp.experts.{}.up_proj": "block_sparse_moe.experts.{}.w3",
    },
)
