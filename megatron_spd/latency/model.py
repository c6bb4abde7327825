"""A plain or SPD model on tensor-parallel ranks through Megatron-core, with a KV cache: what is timed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_spd.checkpoint.hf import CheckpointReader
from megatron_spd.errors import UserError
from megatron_spd.models.build import ModelShape, build_gpt_model
from megatron_spd.plan import SPDPlan
from megatron_spd.runtime.distributed import Runtime


class CachedModel:
    """Greedy decoding of up to ``max_batch`` sequences of up to ``max_length`` tokens (prompt included).

    Every rank calls every method with the same tokens and gets the same result. ``vocab_size``: rows of the output
    layer that are the model's (it may be padded).
    """

    def __init__(self, model: GPTModel, vocab_size: int, max_batch: int, max_length: int) -> None:
        self.model = model.eval()
        self.vocab_size = vocab_size
        self.context = StaticInferenceContext(max_batch, max_length)

    @torch.inference_mode()
    def prefill(self, tokens: Tensor) -> Tensor:
        """Start anew with the prompts ``tokens`` [b, s]; the most probable next tokens [b].

        Raises UserError for more sequences or tokens than there is room for.
        """
        context = self.context
        if tokens.shape[0] > context.max_batch_size or tokens.shape[1] > context.max_sequence_length:
            raise UserError(
                f"prompts of {tokens.shape[0]} x {tokens.shape[1]} tokens; there is room for "
                f"{context.max_batch_size} x {context.max_sequence_length}"
            )
        context.reset()
        return self._next(tokens)

    @torch.inference_mode()
    def decode(self, tokens: Tensor) -> Tensor:
        """Append one token to every sequence, ``tokens`` [b]; the most probable next ones [b]."""
        self.context.enable_decode_mode()
        return self._next(tokens[:, None])

    def _next(self, tokens: Tensor) -> Tensor:
        context = self.context
        start = context.sequence_len_offset
        positions = torch.arange(start, start + tokens.shape[1], device=tokens.device).expand_as(tokens)
        # The fused attention needs no mask.
        logits = self.model(tokens, positions, None, inference_context=context, runtime_gather_output=True)
        context.sequence_len_offset += tokens.shape[1]
        return logits[:, -1, : self.vocab_size].argmax(-1)


def load_model(reader: CheckpointReader, plan: SPDPlan, runtime: Runtime, dtype: torch.dtype) -> GPTModel:
    """The model in ``reader`` under ``plan`` on this rank.

    The tokens are the SPD model's where the plan is the export's own (``reader.plan``), or drops points and nothing
    else. Orders of heads and neurons are not applied, and shifts and branch norms that the folder does not have get
    values that change nothing: enough to time any plan.
    """
    family = reader.family

    def block(index: int) -> Mapping[str, Tensor]:
        weights = reader.block(index)
        for entry in family.planned_branch_tensors(plan.blocks[index]):
            if entry.source not in weights:
                constant = torch.full((plan.branches, reader.hidden_size), entry.initial or 0.0)
                weights[entry.source] = constant
        return weights

    shape = ModelShape(family, reader.config, reader.head_dim)
    model = build_gpt_model(shape, plan, block, reader.get, runtime, dtype, fused_attention=True)
    return model.eval().requires_grad_(False)


def share_weights(model: GPTModel, other: GPTModel) -> None:
    """Make the parameters of ``model`` refer to those of ``other`` that have the same name and size: many schedules,
    one set of weights in memory."""
    theirs = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        if name in theirs and theirs[name].shape == parameter.shape:
            parameter.data = theirs[name].data
