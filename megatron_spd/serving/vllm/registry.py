"""The families of SPD exports that vLLM can serve: all that the package knows."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

from transformers import PreTrainedConfig

from megatron_spd.models import registry as models


@dataclass(frozen=True)
class ServedFamily:
    """``architecture`` as an export's config names it; ``config`` and ``model``: classes as "module:name", imported
    when they are needed."""

    architecture: str
    config: str
    model: str

    def config_class(self) -> type[PreTrainedConfig]:
        """The config class; its ``model_type`` is that of the exports."""
        module, name = self.config.split(":")
        return getattr(importlib.import_module(module), name)


_CONFIGS = "megatron_spd.checkpoint.remote_code.configuration_spd"
_MODELS = "megatron_spd.serving.vllm.models"

FAMILIES = tuple(
    ServedFamily(
        architecture=f"SPD{family.classes}ForCausalLM",
        config=f"{_CONFIGS}:SPD{family.classes}Config",
        model=f"{_MODELS}:SPD{family.classes}ForCausalLM",
    )
    for family in models.FAMILIES
)
