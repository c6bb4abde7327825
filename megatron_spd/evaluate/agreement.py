"""Whether an SPD model still writes what the plain model writes: greedy continuations compared token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

#: What is continued: the first tokens of at most so many pieces of text.
PROMPTS, PROMPT_TOKENS = 8, 32


@dataclass(frozen=True)
class Agreement:
    """How another model's greedy continuations compare with the plain model's of N tokens; means over prompts.

    - ``agreement``: share of the N positions where both choose the same next token behind the plain model's text
      (teacher-forced: an early difference counts once, not for all that follows).
    - ``same_prefix``: tokens, 0 to N, before the two models, each running on its own text, first differ.
    - ``rouge_l``: ROUGE-L F1 over the tokens of those two texts.
    """

    agreement: float
    same_prefix: float
    rouge_l: float


def prompts_from(tokens: Tensor) -> Tensor:
    """The prompts cut from the text pieces ``tokens`` [n, s]: [min(n, 8), min(s, 32)]."""
    return tokens[:PROMPTS, :PROMPT_TOKENS]


@torch.inference_mode()
def greedy_continuations(model: PreTrainedModel, prompts: Tensor, count: int) -> Tensor:
    """The ``count`` most probable tokens, one after the other, behind ``prompts`` [n, p]: int64 [n, count] on the CPU.

    All prompts run together. The end-of-text token does not stop a continuation: all have the same length.
    """
    ids, cache, chosen = prompts.to(model.device), None, []
    for _ in range(count):
        out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        ids, cache = out.logits.argmax(-1), out.past_key_values
        chosen.append(ids)
    return torch.cat(chosen, 1).cpu()


@torch.inference_mode()
def forced_choices(model: PreTrainedModel, prompts: Tensor, continuations: Tensor) -> Tensor:
    """The most probable token at each position of ``continuations`` [n, c] given what precedes it there, behind
    ``prompts`` [n, p]: int64 [n, c] on the CPU."""
    texts, count = torch.cat([prompts, continuations], 1)[:, :-1], continuations.shape[1]
    # One at a time: the logits of all texts together may be large.
    rows = [model(text[None].to(model.device), logits_to_keep=count).logits.argmax(-1) for text in texts]
    return torch.cat(rows).cpu()


def measure_agreement(model: PreTrainedModel, prompts: Tensor, plain: Tensor) -> Agreement:
    """``model`` against the plain model's greedy continuations ``plain`` [n, c] of ``prompts`` [n, p]."""
    own = greedy_continuations(model, prompts, plain.shape[1])
    same = forced_choices(model, prompts, plain) == plain
    prefix = (own == plain).long().cumprod(1).sum(1)
    scores = [rouge_l(one, other) for one, other in zip(plain.tolist(), own.tolist(), strict=True)]
    return Agreement(
        agreement=float(same.double().mean()),
        same_prefix=float(prefix.double().mean()),
        rouge_l=sum(scores) / len(scores),
    )


def rouge_l(reference: Sequence[int], candidate: Sequence[int]) -> float:
    """ROUGE-L F1 of two token sequences: 2 LCS / (m + n), LCS the length of their longest common subsequence
    (C.-Y. Lin, ROUGE: A Package for Automatic Evaluation of Summaries, 2004). 0 where they share nothing."""
    row = [0] * (len(candidate) + 1)
    for token in reference:
        above, row = row, [0]
        for j, other in enumerate(candidate):
            row.append(above[j] + 1 if token == other else max(above[j + 1], row[j]))
    return 2 * row[-1] / (len(reference) + len(candidate)) if row[-1] else 0.0
