"""The next-token loss of a GPTModel, or of the pipeline stage of one that a rank has."""

from __future__ import annotations

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import Tensor, nn

from megatron_spd.models.build import vocabulary_rows
from megatron_spd.runtime.distributed import Runtime


class NextTokenLoss(nn.Module):
    """``model`` with a forward that gives the mean negative log-likelihood, as DeepSpeed's engine wants it.

    ``vocab_size``: tokens of the model; rows that pad the vocabulary to a multiple of M take no part.
    """

    def __init__(self, model: GPTModel, runtime: Runtime, vocab_size: int) -> None:
        super().__init__()
        self.model, self.runtime, self.vocab_size = model, runtime, vocab_size

    def forward(self, tokens: Tensor) -> Tensor:
        """``tokens`` [b, s + 1] -> mean over the predictions, in nats; on a stage that is not the last one the hidden
        states [s, b, h] for the next."""
        output = stage_output(self.model, tokens[:, :-1])
        if not self.model.post_process:
            return output
        return token_losses(output, tokens[:, 1:], self.vocab_size, self.runtime).mean()


def stage_output(model: GPTModel, tokens: Tensor) -> Tensor:
    """``tokens`` [b, s] -> this rank's part of the logits [b, s, v / M], or the hidden states that its pipeline stage
    hands on (what comes from the stage before was set by Megatron-core's schedule)."""
    length = tokens.shape[1]
    positions = torch.arange(length, device=tokens.device).expand_as(tokens)
    mask = torch.ones(length, length, dtype=torch.bool, device=tokens.device).triu(1)[None, None]
    return model(tokens, positions, mask)


def token_losses(logits: Tensor, labels: Tensor, vocab_size: int, runtime: Runtime) -> Tensor:
    """Negative log-likelihoods [s, b] in nats of ``labels`` [b, s] under ``logits`` [b, s, v / M]."""
    rows = logits.shape[-1]
    padding = torch.arange(rows, device=logits.device) >= vocabulary_rows(rows, vocab_size, runtime)
    logits = logits.masked_fill(padding, torch.finfo(logits.dtype).min)
    return vocab_parallel_cross_entropy(logits.transpose(0, 1).contiguous(), labels.T.contiguous())
