"""The MLP sublayer of the sync-point rule in a model with experts.

Experts are split like any MLP: a branch holds a part of the neurons of *every* expert, and the router is replicated.
Where branches see different inputs z_g, each routes on its own:

    sublayer_g(z_g) = sum over the experts e that router(z_g) chooses of  weight_e(z_g) * expert_{e,g}(z_g)

so that for one token branch 0 may compute its part of expert 3 and branch 1 its part of expert 5. Under ``routing``
"first" the first branch chooses, and weighs, for all: router(z_0) in the place of router(z_g).

Parameters, their names, sharding and checkpoints are those of Megatron-core's MoELayer, and so is the choice of
experts (TopKRouter). What runs the experts is written here, because MoELayer's token dispatchers take one decision for
all tensor-parallel ranks and reduce what the experts give.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional

from megatron_spd.comm.routing import broadcast_routing


def unsupported_expert_settings(config: TransformerConfig) -> dict[str, bool]:
    """What a config with experts may ask for and this sublayer does not do, by name; True where it is asked for."""
    if config.num_moe_experts is None:
        return {}
    coefficients = config.moe_aux_loss_coeff
    losses = any(coefficients) if isinstance(coefficients, list) else bool(coefficients)
    return {
        "expert_model_parallel_size > 1": config.expert_model_parallel_size > 1,
        "moe_shared_expert_intermediate_size": config.moe_shared_expert_intermediate_size is not None,
        "moe_layer_freq other than 1": config.moe_layer_freq != 1,
        "moe_aux_loss_coeff": losses,
        "moe_z_loss_coeff": config.moe_z_loss_coeff is not None,
        "moe_router_load_balancing_type 'sinkhorn'": config.moe_router_load_balancing_type == "sinkhorn",
        "moe_expert_capacity_factor": config.moe_expert_capacity_factor is not None,
        "moe_input_jitter_eps": config.moe_input_jitter_eps is not None,
        "moe_router_score_function other than softmax": config.moe_router_score_function != "softmax",
        "biases of experts (add_bias_linear)": config.add_bias_linear,
        "moe_grouped_gemm": config.moe_grouped_gemm,
    }


class BranchRouter(TopKRouter):
    """Megatron-core's router with its weight as an argument, so that its gradient can be summed where ranks use it
    differently."""

    def forward(self, z: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """``z`` [t, h], ``weight`` [E, h] -> weights [t, k] and numbers [t, k] of the experts chosen."""
        probabilities, chosen = self.routing(functional.linear(z, weight).unsqueeze(1))
        experts = chosen.nonzero()[:, 1].view(len(z), self.topk)
        return probabilities.gather(1, experts), experts


class BranchMoE(MegatronModule):
    """Router and experts. Their linears must be ``BranchColumnParallelLinear`` and ``PartialRowParallelLinear``.

    ``local_branches``: B = G / M, or 1 where the rank's branches need not be told apart. ``per_branch``: keep their
    outputs apart. ``one_router``: the first branch's choice is everyone's, and crosses ranks.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MLPSubmodules,
        local_branches: int,
        per_branch: bool,
        one_router: bool,
        pg_collection: ProcessGroupCollection | None = None,
        **_: Any,  # newer versions of Megatron-core tell a layer's MLP more
    ) -> None:
        super().__init__(config)
        groups = pg_collection or get_default_pg_collection()
        self.tp_group = groups.tp
        self.local_branches, self.per_branch, self.one_router = local_branches, per_branch, one_router
        self.router = BranchRouter(config, groups)
        self.experts = SequentialMLP(config.num_moe_experts, config, submodules, groups)

    def forward(self, z: Tensor, router_weight: Tensor | None = None) -> tuple[Tensor, None]:
        """``z`` [1 or B, s, b, h] -> partial sums [B or 1, s, b, h], and no bias. ``router_weight`` [E, h] stands in
        for the router's own."""
        weight = self.router.weight if router_weight is None else router_weight
        inputs = z.flatten(1, 2)
        routes = self._routes(inputs, weight)
        parts = [
            self._branch(g, inputs[min(g, len(inputs) - 1)], *routes[min(g, len(routes) - 1)])
            for g in range(self.local_branches)
        ]
        output = torch.stack(parts) if self.per_branch else sum(parts[1:], parts[0]).unsqueeze(0)
        return output.unflatten(1, z.shape[1:3]), None

    def _routes(self, inputs: Tensor, weight: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Weights and numbers of experts, each [t, k], for each of the inputs [1 or B, t, h]; one for all under
        ``one_router``."""
        if not self.one_router:
            return [self.router(z, weight) for z in inputs]
        weights, experts = self.router(inputs[0], weight)
        return [broadcast_routing(weights, experts, self.tp_group)]

    def _branch(self, g: int, z: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """What the rank's branch ``g`` adds for ``z`` [t, h]: [t, h]."""
        output = torch.zeros_like(z)
        for number, expert in enumerate(self.experts.local_experts):
            tokens, places = (chosen == number).nonzero(as_tuple=True)
            out = _expert_branch(expert, g, z[tokens], weights[tokens, places])
            output = output.index_add(0, tokens, out)
        return output


def _expert_branch(expert: MLP, g: int, x: Tensor, weights: Tensor) -> Tensor:
    """Branch ``g`` of one expert on ``x`` [n, h], times ``weights`` [n]: [n, h]."""
    gate, up = expert.linear_fc1.branch_forward(x, g).chunk(2, -1)
    act = expert.activation_func(gate) * up * weights.unsqueeze(-1)
    return expert.linear_fc2.branch_forward(act, g)
