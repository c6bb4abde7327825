"""Qwen2 and Qwen2.5: q, k and v have biases, nothing else has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_spd.models.family import BlockSettings, ModelFamily
from megatron_spd.models.reading import expect, positive_number, window_of_some_blocks


def _settings(hf: Mapping[str, Any]) -> BlockSettings:
    expect(hf, hidden_act="silu")
    return BlockSettings(positive_number(hf, "rms_norm_eps"), qkv_bias=True, window=window_of_some_blocks(hf))


QWEN2 = ModelFamily(model_type="qwen2", classes="Qwen2", settings=_settings)
