"""Llama 2 / 3.x (and SmolLM2, which is a Llama)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_spd.models.family import BlockSettings, ModelFamily
from megatron_spd.models.reading import expect, positive_number


def _settings(hf: Mapping[str, Any]) -> BlockSettings:
    expect(hf, hidden_act="silu")
    attention_bias = bool(hf.get("attention_bias"))
    return BlockSettings(
        norm_eps=positive_number(hf, "rms_norm_eps"),
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=bool(hf.get("mlp_bias")),
    )


LLAMA = ModelFamily(model_type="llama", classes="Llama", settings=_settings)
