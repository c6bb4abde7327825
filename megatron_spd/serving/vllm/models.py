"""SPD exports of every family: vLLM's own models whose layers follow the export's plan.

``SPD<Family>ForCausalLM`` is made here of vLLM's ``<Family>ForCausalLM`` when it is asked for. A layer gets another
class when the model is built, so that its parts, their names and what vLLM has noted of them stay vLLM's.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from vllm import ModelRegistry
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size

from megatron_spd.plan import SPDPlan
from megatron_spd.serving.vllm.checks import plan_of
from megatron_spd.serving.vllm.experts import ExpertsRule, MixtralRule
from megatron_spd.serving.vllm.rule import OneTensorRule, SyncPointRule


class SPDForCausalLM:
    """Mixed in front of vLLM's model of a family; blocks of the plan in which nothing is dropped or low-bit are its
    own. Raises UserError where the plan does not run on this many ranks."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        plan, model = plan_of(vllm_config.model_config.hf_config), getattr(self, "model")  # noqa: B009
        if plan is not None:
            follow_plan(getattr(model, "decoder", model).layers, plan)


def follow_plan(layers: nn.ModuleList, plan: SPDPlan) -> None:
    """Make vLLM's decoder ``layers`` compute the blocks of ``plan`` on this rank."""
    plan.check_ranks(get_tensor_model_parallel_world_size())
    layer: Any
    for block, layer in enumerate(layers):
        if not plan.block_schedule(block).is_stock:
            layer.__class__ = _layer_class(type(layer))
            layer.follow(plan, block)


#: The rule of layers whose parts are not those of a Llama's.
_RULES: dict[str, type[SyncPointRule]] = {
    "OPTDecoderLayer": OneTensorRule,
    "MixtralDecoderLayer": MixtralRule,
    "Qwen3MoeDecoderLayer": ExpertsRule,
}

_made: dict[str, type] = {}


def _layer_class(stock: type[nn.Module]) -> type[nn.Module]:
    """vLLM's decoder layer ``stock`` under the rule."""
    name = f"SPD{stock.__name__}"
    if name not in _made:
        rule = _RULES.get(stock.__name__, SyncPointRule)
        _made[name] = type(name, (rule, stock), {"__module__": __name__})
    return _made[name]


def __getattr__(name: str) -> Any:
    stock = ModelRegistry.models.get(name.removeprefix("SPD"))
    if not name.startswith("SPD") or stock is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name not in _made:
        _made[name] = type(name, (SPDForCausalLM, stock.load_model_cls()), {"__module__": __name__})
    return _made[name]
