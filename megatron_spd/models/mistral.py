"""Mistral: a Llama without biases, with a sliding window in its first version."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_spd.models.family import BlockSettings, ModelFamily
from megatron_spd.models.reading import expect, positive_number


def _settings(hf: Mapping[str, Any]) -> BlockSettings:
    expect(hf, hidden_act="silu")
    return BlockSettings(positive_number(hf, "rms_norm_eps"), window=hf.get("sliding_window", 4096))


MISTRAL = ModelFamily(model_type="mistral", classes="Mistral", settings=_settings)
