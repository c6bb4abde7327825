"""What calibration looks at: some sequences' hidden states in front of a sublayer, dense and under the rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from megatron_spd.grouping.formulas import BlockFormulas
from megatron_spd.grouping.refit import InputFit
from megatron_spd.grouping.shift import ordinary_tokens


@dataclass(frozen=True)
class Chunk:
    """Hidden states of some sequences: the dense model's, and X [s, b, h] and P [G, s, b, h] of the unit."""

    dense: Tensor
    x: Tensor
    pending: Tensor | None = None

    def branch_inputs(self) -> Tensor:
        """X + P_g [G, s, b, h], or X [1, s, b, h] where nothing is pending."""
        return self.x[None] if self.pending is None else self.x + self.pending

    def synced(self) -> Tensor:
        """X [s, b, h] as it is where the ranks sync here."""
        return self.x if self.pending is None else self.x + self.pending.sum(0)


@dataclass(frozen=True)
class Sample:
    """A rank's own sequences in front of a unit: to fit on, and to judge by."""

    fit: list[Chunk]
    judge: list[Chunk]

    @classmethod
    def of(cls, fit: Sequence[Tensor], judge: Sequence[Tensor]) -> Sample:
        """From dense hidden states [s, b, h]."""
        return cls([Chunk(x, x) for x in fit], [Chunk(x, x) for x in judge])


@dataclass(frozen=True)
class TokenRows:
    """Some tokens of a chunk: ``mask`` [s, b]."""

    chunk: Chunk
    mask: Tensor

    def select(self, x: Tensor) -> Tensor:
        """[s, b, h] -> [n, h]; [G, s, b, h] -> [G, n, h]."""
        return x[:, self.mask] if x.dim() == 4 else x[self.mask]


def token_rows(chunks: Sequence[Chunk], tokens: int | None = None) -> list[TokenRows]:
    """The ordinary tokens of ``chunks``; about ``tokens`` of them, evenly spaced, if given."""
    rows = [TokenRows(chunk, ordinary_tokens(chunk.dense)) for chunk in chunks]
    have = sum(r.mask.numel() for r in rows)
    if tokens is None or have <= tokens:
        return rows
    return rows[:: -(-have // max(tokens, 1))]


def read_inputs(block: BlockFormulas, sublayer: str, fit: InputFit, chunk: Chunk) -> Tensor:
    """z_g [G or 1, s, b, h]: the rule's reading, without the folded map."""
    inputs = chunk.branch_inputs()
    if fit.shift is not None:
        inputs = inputs + fit.shift[:, None, None]
    z = block.normed(inputs, sublayer)
    if fit.norm_weight is not None and fit.norm_bias is not None:
        z = z * fit.norm_weight[:, None, None] + fit.norm_bias[:, None, None]
    return z


def with_bias(x: Tensor, block: BlockFormulas, sublayer: str) -> Tensor:
    """X + b, the second part of the rule's step."""
    bias = block.output_bias(sublayer)
    return x if bias is None else x + bias
