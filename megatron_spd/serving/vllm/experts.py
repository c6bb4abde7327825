"""The sync-point rule in a model with experts: vLLM's router and fused experts, every expert split over branches.

A branch holds a part of the neurons of every expert, which is how vLLM's tensor parallelism cuts them, and each branch
routes on what it sees itself (``layers/moe.py``). With one branch on a rank its experts need nothing but to leave their
sum to the rule. A rank with B = G / M branches that read or give different things gets B * E experts, the parts of
expert e being those of numbers e * B + b, and sends each branch's row of a token to the parts that are its own.

Under ``routing`` "first" the router's logits are those of the first branch: on the ranks, an all-reduce to which the
first gives them and the others zeros. It is exact, and works in CUDA graphs as vLLM's other all-reduces do.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.utils import replace_parameter

from megatron_spd.errors import UserError
from megatron_spd.plan import SPDPlan
from megatron_spd.serving.vllm.rule import Parts, Step, SyncPointRule


class BranchExpertsMethod(UnquantizedFusedMoEMethod):
    """Runs the experts of a rank with several ``branches`` as vLLM runs experts, each branch's part being one.

    ``like``: vLLM's settings of the whole experts. Raises UserError where its kernel pads them or chooses among them.
    """

    def __init__(self, like: Any, branches: int) -> None:
        numbers = ("num_experts", "num_local_experts", "num_logical_experts")
        parts = {name: getattr(like, name) * branches for name in numbers}
        size = {"intermediate_size": like.intermediate_size // branches}
        unset = {"intermediate_size_per_partition_unpadded": None}
        tokens = {"max_num_tokens": like.max_num_tokens * branches}
        super().__init__(dataclasses.replace(like, **parts, **size, **unset, **tokens))
        self.branches = branches
        if like.intermediate_size_per_partition != like.intermediate_size // like.tp_size:
            _refuse("pads the neurons of experts")
        if self.is_monolithic:
            _refuse("chooses experts inside its kernel")

    def process_weights_after_loading(self, layer: Any) -> None:
        """Split the loaded weights [E, 2 * F, h] (gate, up) and [E, h, F], F neurons on this rank, into those of the
        parts, [B * E, 2 * F / B, h] and [B * E, h, F / B], and go on as with any."""
        both = layer.w13_weight.data.unflatten(1, (2, self.branches, -1)).transpose(1, 2)
        down = layer.w2_weight.data.unflatten(2, (self.branches, -1)).movedim(2, 1)
        replace_parameter(layer, "w13_weight", both.flatten(2, 3).flatten(0, 1).contiguous())
        replace_parameter(layer, "w2_weight", down.flatten(0, 1).contiguous())
        layer.moe_config = self.moe
        layer.global_num_experts, layer.local_num_experts = self.moe.num_experts, self.moe.num_local_experts
        layer.intermediate_size_per_partition = self.moe.intermediate_size_per_partition
        super().process_weights_after_loading(layer)

    def apply(
        self, layer: Any, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, *shared: Any, **by: Any
    ) -> Tensor:
        """``x`` [T * B, h], for each token its branches one after the other; weights and numbers [T * B, k] of the
        whole experts chosen -> what each branch's parts of them give, [T * B, h]."""
        branch = torch.arange(len(x), device=x.device, dtype=topk_ids.dtype) % self.branches
        parts = topk_ids * self.branches + branch.unsqueeze(-1)
        return super().apply(layer, x, topk_weights, parts, *shared, **by)


def _refuse(what: str) -> None:
    raise UserError(
        f"vLLM {what} here, which does not go with several branches on a rank; serve with one rank for each of the "
        "branches, or with another --moe-backend"
    )


class ExpertsRule(SyncPointRule):
    """For a decoder layer whose MLP has a router ``gate`` and ``experts``."""

    MLP = Parts("mlp", "post_attention_layernorm", ("mlp", "gate"), ("mlp", "experts"))

    #: Whether the first branch chooses for all, and whether branches go through the experts one by one.
    one_router: bool
    apart: bool

    def follow(self, plan: SPDPlan, block: int) -> None:
        """As :meth:`SyncPointRule.follow`."""
        schedule = plan.block_schedule(block)
        self.one_router = schedule.routing == "first" and schedule.mlp_inputs_differ
        super().follow(plan, block)

    def _split(self, step: Step) -> None:
        if step.parts is not self.MLP:
            super()._split(step)
            return
        experts = self._part(step.parts.row)
        # The logits come from here: the rule may exchange them.
        experts.gate = None
        experts.moe_config.skip_final_all_reduce = True
        self.apart = self.branches > 1 and not (step.plain_input and step.all_reduce is not None)
        if self.apart:
            method = BranchExpertsMethod(experts.moe_config, self.branches)
            experts.routed_experts.quant_method = method

    def _run_mlp(self, z: Tensor) -> Tensor:
        """``z`` [T, h] or [T, B * h] -> [T, h], or [T, B * h] at a dropped point."""
        moe = getattr(self, self.MLP.module)
        x = z.unflatten(-1, (-1, moe.gate.input_size))
        logits = moe.gate(x.flatten(0, 1))[0].unflatten(0, x.shape[:2])
        if self.one_router:
            logits = _of_the_first(logits[:, :1])
        if self.apart:
            x = x.expand(-1, self.branches, -1)
        logits = logits.expand(-1, x.shape[1], -1)
        out = moe.experts(x.flatten(0, 1), logits.flatten(0, 1)).unflatten(0, x.shape[:2])
        return out.flatten(1) if self.mlp_step.all_reduce is None else out.sum(1)


def _of_the_first(logits: Tensor) -> Tensor:
    """``logits`` [T, 1, E] of the first rank, on every rank."""
    if get_tensor_model_parallel_world_size() == 1:
        return logits
    given = logits if get_tensor_model_parallel_rank() == 0 else torch.zeros_like(logits)
    return tensor_model_parallel_all_reduce(given)


class MixtralRule(ExpertsRule):
    """For Mixtral's decoder layer, which calls its experts otherwise."""

    MLP = Parts(
        "block_sparse_moe",
        "post_attention_layernorm",
        ("block_sparse_moe", "gate"),
        ("block_sparse_moe", "experts"),
    )
