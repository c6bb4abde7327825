"""vLLM serves SPD exports: a plug-in of the entry point group ``vllm.general_plugins``.

vLLM calls :func:`register` in every process that it starts. From then on it knows the config and the model of an
export, so that ``vllm serve EXPORT --tensor-parallel-size M`` needs no code from the export's folder.
"""

from __future__ import annotations


def register() -> None:
    """Tell vLLM the families in ``registry.py`` and the check of its options; may be called again.

    The models themselves are imported when vLLM builds one.
    """
    from transformers import AutoConfig
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from megatron_spd.serving.vllm.checks import SPDOptionsCheck
    from megatron_spd.serving.vllm.registry import FAMILIES

    for family in FAMILIES:
        config = family.config_class()
        AutoConfig.register(config.model_type, config, exist_ok=True)
        if family.architecture not in ModelRegistry.models:
            ModelRegistry.register_model(family.architecture, family.model)
        MODELS_CONFIG_MAP[family.architecture] = SPDOptionsCheck
