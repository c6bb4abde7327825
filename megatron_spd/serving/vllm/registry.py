"""The families of SPD exports that vLLM can serve."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

from transformers import PreTrainedConfig


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


FAMILIES = (
    ServedFamily(
        architecture="SPDLlamaForCausalLM",
        config="megatron_spd.checkpoint.remote_code.configuration_spd_llama:SPDLlamaConfig",
        model="megatron_spd.serving.vllm.llama:SPDLlamaForCausalLM",
    ),
)
