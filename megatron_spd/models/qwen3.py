"""Qwen3: query and key heads have a norm of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_spd.models.family import BlockSettings, ModelFamily
from megatron_spd.models.reading import expect, positive_number, window_of_some_blocks
from megatron_spd.models.tables import block_tables


def _settings(hf: Mapping[str, Any]) -> BlockSettings:
    expect(hf, hidden_act="silu")
    bias = bool(hf.get("attention_bias"))
    eps, window = positive_number(hf, "rms_norm_eps"), window_of_some_blocks(hf)
    return BlockSettings(eps, qkv_bias=bias, output_bias=bias, window=window)


QWEN3 = ModelFamily(
    model_type="qwen3", classes="Qwen3", settings=_settings, tables=block_tables(qk_norm=True), head_dim=128
)
