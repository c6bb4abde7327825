"""SPD exports of the Llama family: vLLM's Llama whose layers follow the export's plan."""

from __future__ import annotations

from vllm.config import VllmConfig
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM

from megatron_spd.serving.vllm.checks import plan_of
from megatron_spd.serving.vllm.rule import SyncPointRule, layer_type


class SPDLlamaDecoderLayer(SyncPointRule, LlamaDecoderLayer):
    """vLLM's Llama block under the sync-point rule."""


class SPDLlamaForCausalLM(LlamaForCausalLM):
    """vLLM's Llama; blocks of the plan in which nothing is dropped or low-bit are its own."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        plan = plan_of(vllm_config.model_config.hf_config)
        layers = layer_type(plan, LlamaDecoderLayer, SPDLlamaDecoderLayer)
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=layers)
