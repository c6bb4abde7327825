"""The sync-point rule (method section 9) as a Megatron-core transformer layer.

State between sublayers: the synced residual X [s, b, h] and, while points are dropped, the pending sums of the rank's
B = G / M branches, P [B, s, b, h]. (For M > G each of the M / G ranks of a branch has B = 1 and the branch's whole P;
``comm/branches.py`` says what is summed where.) For a sublayer with output bias b, optional shift c_g (else 0) and
optional branch norm w_g, b_g (else 1 and 0):

    z_g = norm(X + P_g + c_g) * w_g + b_g;   P_g += sublayer_g(z_g);   X += b
    if the sync point after it is kept:   X += all_reduce(sum_g P_g);   P = 0

The all-reduce may be a low-bit one (method section 5). What is quantised is what a rank of M = G would send, the sum of
one branch: a single process keeps its branches apart up to there and computes what G ranks would get. For 1 < M < G
a rank sums its branches first, and for M > G it sends its part of one, so that there the result depends on M.

P travels from layer to layer as the ``context`` that Megatron-core's TransformerBlock hands on (it is not
otherwise used by decoder-only models), so it survives activation recomputation.

Between layers inside a segment the gradient of ``hidden_states`` is a partial sum over ranks (see
``comm/autograd.py``).

Sequence parallel: between segments X is cut along the sequence, [s / M, b, h]. A segment's entry gathers it, once for
all its uses, and what leaves is the rank's part of X plus a reduce-scatter of the pending sums; backward the two
change places. Inside a segment nothing is cut. Gradients of norms and output biases are partial sums then, and
marked as Megatron-core marks them: its ``finalize_model_grads`` sums them once per step (or see ``layers/norm.py``).
"""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.random import get_data_parallel_rng_tracker_name
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.utils import get_pg_rank
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_spd.collective import CollectiveFormat, low_bit_format
from megatron_spd.comm.autograd import enter_segment, leave_segment, share_parameters, sum_low_bit
from megatron_spd.comm.branches import BranchShare
from megatron_spd.layers.moe import BranchMoE
from megatron_spd.plan import BlockSchedule

Sublayer = Literal["attention", "mlp"]

#: The norm in front of each sublayer.
_NORMS: dict[Sublayer, str] = {"attention": "input_layernorm", "mlp": "pre_mlp_layernorm"}

#: The router's weight among shared parameters. It weighs partial sums: every rank's gradient of it is another.
_ROUTER = "mlp/router"

#: Keyword arguments of the layer that belong to its self attention.
_ATTENTION_ARGUMENTS = (
    "inference_context",
    "rotary_pos_cos",
    "rotary_pos_sin",
    "rotary_pos_cos_sin",
    "attention_bias",
    "packed_seq_params",
    "sequence_len_offset",
)


def _output_bias(sublayer: Sublayer, linear: nn.Module) -> dict[str, Tensor]:
    """The bias of a sublayer's last linear by its name among shared parameters; empty without one (Transformer
    Engine's linears have an empty tensor there, which is no parameter)."""
    own = dict(linear.named_parameters(recurse=False))
    return {f"{sublayer}/output_bias": own["bias"]} if "bias" in own else {}


class SPDTransformerLayer(TransformerLayer):
    """One block under ``schedule``. Its submodules must be those that ``spec.py`` makes: linears that return partial
    sums. ``branch_group``: the ranks that share this rank's branch, for M > G. Parameters beside those of the stock
    layer, where the schedule has them, [B, h] and the branch's own (their gradients are summed inside ``branch_group``
    only): for ``attention`` and ``mlp`` each ``_shift`` c_g, ``_norm_weight`` w_g and ``_norm_bias`` b_g."""

    def __init__(
        self, *args: Any, schedule: BlockSchedule, branch_group: ProcessGroup | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.schedule = schedule
        ranks = self.tp_group.size()
        self.share = BranchShare(schedule.branches, ranks, self.tp_group.rank(), branch_group)
        self._sequence_parallel = self.config.sequence_parallel and ranks > 1
        self._collectives = {
            "attention": low_bit_format(schedule.attention_collective),
            "mlp": low_bit_format(schedule.mlp_collective),
        }
        self.attention_shift = self._branch_vectors(schedule.attention_shift, 0.0)
        self.attention_norm_weight = self._branch_vectors(schedule.attention_norm, 1.0)
        self.attention_norm_bias = self._branch_vectors(schedule.attention_norm, 0.0)
        self.mlp_shift = self._branch_vectors(schedule.mlp_shift, 0.0)
        self.mlp_norm_weight = self._branch_vectors(schedule.mlp_norm, 1.0)
        self.mlp_norm_bias = self._branch_vectors(schedule.mlp_norm, 0.0)

    def _branch_vectors(self, wanted: bool, value: float) -> nn.Parameter | None:
        """A parameter [B, h] filled with ``value``, or None where it is not ``wanted``."""
        if not wanted:
            return None
        size = (self.share.local, self.config.hidden_size)
        weight = self.self_attention.linear_proj.weight
        # Not weight.new_full: Transformer Engine's weight may be an FP8 tensor.
        vectors = nn.Parameter(torch.full(size, value, dtype=weight.dtype, device=weight.device))
        # Gradient norms count such a parameter on every rank, any other on the first: once for each branch.
        set_tensor_model_parallel_attributes(vectors, self.share.leads, 0, 1)
        return vectors

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Megatron-core's TransformerBlock names its arguments. Hooks, by which DeepSpeed's ZeRO-3 knows that the
        layer's backward pass is over, see only what is given by position; CUDA graphs want the name."""
        if "hidden_states" in kwargs and not hasattr(self, "cudagraph_manager"):
            args = (kwargs.pop("hidden_states"), *args)
        return super().__call__(*args, **kwargs)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        rotary_pos_emb: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """``hidden_states`` X [s, b, h] and ``context`` P [B, s, b, h] (None right after a sync, where a
        sequence-parallel X is [s / M, b, h]) -> the same two."""
        attention_kwargs = {k: kwargs[k] for k in _ATTENTION_ARGUMENTS if k in kwargs}
        shared = self._shared_parameters()

        def attention(z: Tensor) -> tuple[Tensor, Tensor | None]:
            return self.self_attention(
                z, attention_mask=attention_mask, rotary_pos_emb=rotary_pos_emb, **attention_kwargs
            )

        x, pending = self._sublayer("attention", attention, shared, hidden_states, context)
        mlp = self.mlp if _ROUTER not in shared else partial(self.mlp, router_weight=shared[_ROUTER])
        return self._sublayer("mlp", mlp, shared, x, pending)

    def _shared_parameters(self) -> dict[str, Tensor]:
        """Parameters that several ranks hold and each uses in another function, by name, ready for such use."""
        named = {
            f"{norm}.{name}": p
            for norm in _NORMS.values()
            for name, p in getattr(self, norm).named_parameters()
        }
        if self._sequence_parallel:
            return named | self._own_vectors()  # summed once per step, not in every backward pass
        if self.schedule.drop_attention:
            named |= _output_bias("attention", self.self_attention.linear_proj)
        if isinstance(self.mlp, BranchMoE):
            named[_ROUTER] = self.mlp.router.weight
        elif self.schedule.drop_mlp:
            named |= _output_bias("mlp", self.mlp.linear_fc2)
        shared = dict(zip(named, share_parameters(list(named.values()), self.tp_group), strict=True))
        return shared | self.share.share(self._own_vectors())

    def _own_vectors(self) -> dict[str, Tensor]:
        """Shifts and branch norms. The stock layer has parameters in its submodules only."""
        return dict(self.named_parameters(recurse=False))

    def _sublayer(
        self,
        name: Sublayer,
        sublayer: Any,
        shared: dict[str, Tensor],
        x: Tensor,
        pending: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """One step of the rule: X [s, b, h], P [B, s, b, h] or None -> the same two."""
        shift, drop = shared.get(f"{name}_shift"), getattr(self.schedule, f"drop_{name}")
        if pending is None:
            x = self._enter(x)
        branch_input = x.unsqueeze(0) if pending is None else x + pending
        if shift is not None:
            branch_input = branch_input + shift[:, None, None, :]
        output, bias = sublayer(self._norm(name, shared, branch_input))
        bias = shared.get(f"{name}/output_bias", bias)
        output, bias = self._dropout(output, bias)
        if bias is not None and (drop or self._sequence_parallel):
            x, bias = x + bias, None
        if drop:
            output = self.share.add_up(output)
            return x, output if pending is None else pending + output
        x = self._sync(x, output, pending, self._collectives[name])
        return x if bias is None else x + bias, None

    def _enter(self, x: Tensor) -> Tensor:
        """X for use inside a segment, [s, b, h]."""
        if self._sequence_parallel:
            return gather_from_sequence_parallel_region(x, group=self.tp_group)
        return enter_segment(x, self.tp_group)

    def _sync(
        self, x: Tensor, output: Tensor, pending: Tensor | None, collective: CollectiveFormat | None
    ) -> Tensor:
        """X plus the sum over branches and ranks of ``output`` [1 or G, s, b, h] and ``pending`` [B, s, b, h]."""
        if collective is not None and len(output) > 1:
            return x + sum_low_bit(output if pending is None else pending + output, collective)
        total = output[0]
        if pending is not None and self.share.leads:
            total = total + (pending[0] if pending.shape[0] == 1 else pending.sum(0))
        if self._sequence_parallel:
            own = x.chunk(self.tp_group.size())[self.tp_group.rank()]
            return own + reduce_scatter_to_sequence_parallel_region(total, group=self.tp_group)
        return leave_segment(x, total, self.tp_group, collective)

    def _norm(self, sublayer: Sublayer, shared: dict[str, Tensor], x: Tensor) -> Tensor:
        """The norm in front of ``sublayer``, branch norm included: [1 or B, s, b, h] -> the same, or [B, s, b, h]."""
        weight, bias = shared.get(f"{sublayer}_norm_weight"), shared.get(f"{sublayer}_norm_bias")
        module = getattr(self, _NORMS[sublayer])
        own = dict(module.named_parameters())
        parameters = {name: shared[f"{_NORMS[sublayer]}.{name}"] for name in own}
        if weight is not None and len(weight) == 1:
            # One branch on the rank: w_g scales the norm's own parameters, which costs no pass over the activations.
            parameters = {name: p * weight[0] for name, p in parameters.items()}
        if all(parameters[name] is own[name] for name in own):
            normed = module(x)
        else:
            normed = torch.func.functional_call(module, parameters, (x,))
        if weight is None or bias is None:
            return normed
        if len(weight) == 1:
            return normed + bias[0]
        return torch.addcmul(bias[:, None, None, :], normed, weight[:, None, None, :])

    def _dropout(self, output: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Hidden dropout: one mask [s, b, h] per sync point, the same on all ranks and branches and for the
        bias, so that dropping the point changes where the output is summed and not what is dropped out of
        it."""
        if not self.training or self.hidden_dropout == 0.0:
            return output, bias
        with self._same_random_state():
            mask = F.dropout(torch.ones_like(output[0]), self.hidden_dropout)
        return output * mask, None if bias is None else bias * mask

    def _same_random_state(self) -> contextlib.AbstractContextManager[None]:
        """Numbers drawn inside are the same on all ranks: a sequence-parallel TransformerBlock runs its layers on
        random states that differ."""
        if not self._sequence_parallel:
            return contextlib.nullcontext()
        return get_cuda_rng_tracker().fork(get_data_parallel_rng_tracker_name())

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """As the stock layer's, with shifts and branch norms sharded over their branch axis."""
        sharded = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        data_rank = get_pg_rank((metadata or {}).get("dp_cp_group"))
        axis, share = len(sharded_offsets), self.share
        offset = (axis, share.mine.start // share.local, share.branches // share.local)
        for name, vectors in self._own_vectors().items():
            sharded[prefix + name] = ShardedTensor.from_rank_offsets(
                prefix + name,
                vectors,
                *sharded_offsets,
                offset,
                replica_id=(0, share.copy, data_rank),
                prepend_axis_num=axis,
            )
        return sharded
