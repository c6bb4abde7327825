"""What an SPD export asks of vLLM's options, checked before any rank is started."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.model_executor.models.config import VerifyAndUpdateConfig

from megatron_spd.errors import UserError
from megatron_spd.models.registry import family_of
from megatron_spd.plan import SPDPlan

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from vllm.config import VllmConfig


def plan_of(config: PreTrainedConfig) -> SPDPlan | None:
    """The plan in an export's config; None where it has none (nothing is dropped). Raises PlanError."""
    raw = getattr(config, "spd_plan", None)
    return None if raw is None else SPDPlan.from_dict(raw)


class SPDOptionsCheck(VerifyAndUpdateConfig):
    """vLLM's hook for checks of a model against all options, called where the user's call or command runs."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Raise UserError for options under which the export would not compute the plan."""
        config = vllm_config.model_config.hf_config
        check_model(config)
        plan = plan_of(config)
        if plan is not None:
            check_options(plan, vllm_config)


def check_model(config: PreTrainedConfig) -> None:
    """Raise UserError for an export of a model that vLLM's class of its family does not compute."""
    if config.model_type == "spd_qwen3" and getattr(config, "attention_bias", False):
        raise UserError(
            "vLLM's Qwen3 has no bias behind its attention (attention_bias = true) and would leave this model's out; "
            "serve it in transformers"
        )


def check_options(plan: SPDPlan, vllm_config: VllmConfig) -> None:
    """Raise UserError unless ``plan`` runs under ``vllm_config``: a fitting M, and nothing that reads or changes the
    hidden states between blocks, which are partial sums where a plan drops points."""
    ranks = vllm_config.parallel_config.tensor_parallel_size
    plan.check_ranks(ranks)
    if all(plan.block_schedule(block).is_stock for block in range(plan.num_layers)):
        return
    experts = family_of(plan.base_model.model_type).tables.experts
    if experts and ranks > plan.branches:
        raise UserError(
            f"experts with M = {ranks} ranks for G = {plan.branches} branches are not supported; serve with "
            f"--tensor-parallel-size {plan.branches} or less"
        )
    for given, option, instead in _refused(vllm_config, experts):
        if given:
            raise UserError(
                f"{option} does not work with an SPD model (points dropped or low-bit); {instead}"
            )
    if ranks < plan.branches and vllm_config.model_config.quantization is not None:
        raise UserError(
            f"quantized weights need one rank for each of the G = {plan.branches} branches, but M = {ranks}; serve "
            f"with --tensor-parallel-size {plan.branches} or without quantization"
        )


def _refused(vllm_config: VllmConfig, experts: bool) -> list[tuple[bool, str, str]]:
    """(whether it was given, the option, what to do) of options that the rule does not allow, in a model with
    ``experts`` or without."""
    parallel: Any = vllm_config.parallel_config
    speculative: Any = vllm_config.speculative_config
    return [
        (parallel.pipeline_parallel_size > 1, "--pipeline-parallel-size > 1", "use tensor parallelism alone"),
        (
            speculative is not None and speculative.use_eagle(),
            "speculative decoding from hidden states",
            "use a draft model or n-grams",
        ),
        (
            experts and parallel.enable_expert_parallel,
            "--enable-expert-parallel",
            "every rank holds a part of every expert",
        ),
        (
            experts and parallel.data_parallel_size > 1,
            "--data-parallel-size > 1 (which cuts experts further)",
            "start several servers",
        ),
        (vllm_config.lora_config is not None, "--enable-lora", "merge the adapter before `megatron-spd run`"),
    ]
