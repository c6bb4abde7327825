"""Hidden states block by block: weights come and go, activations stay.

A *stream* is the hidden states of the whole token set in front of some block: a list of micro-batches [s, b,
h]. Streams are advanced one block at a time, so a block's weights are read once for all of them and no more
than one block is in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_spd.calibration.scoring import OutputLayer
from megatron_spd.checkpoint.hf import CheckpointReader
from megatron_spd.comm.all_reduce import all_reduce
from megatron_spd.errors import UserError
from megatron_spd.models.build import BlockUnit, ModelShape, layer_state, refer_to
from megatron_spd.models.weights import shard_block
from megatron_spd.plan import BlockSchedule
from megatron_spd.runtime.distributed import Runtime

BlockWeights = Callable[[int], Mapping[str, Tensor]]

#: Tokens at a time for each thread without a GPU: more of them leave the cache and are slower by up to a fifth.
CPU_TOKENS = 512

_STOCK = BlockSchedule(branches=1)


@dataclass(frozen=True)
class BlockVariant:
    """One block as a candidate computes it: its schedule, and its weights if they are not the streamer's (this rank's
    shard under Hugging Face names)."""

    schedule: BlockSchedule
    own: Mapping[str, Tensor] | None = None


#: The blocks, by number, of the unit whose dropped points are given.
UnitVariants = Callable[[tuple[int, ...]], Mapping[int, BlockVariant]]


def plain_variants(branches: int, num_layers: int) -> UnitVariants:
    """The streamer's own weights under the schedule alone."""

    def variants(points: tuple[int, ...]) -> dict[int, BlockVariant]:
        dropped = set(points)
        last = (max(points) + 1) // 2  # reads what is pending behind a dropped MLP point
        return {
            block: BlockVariant(
                BlockSchedule(
                    branches,
                    pending=2 * block - 1 in dropped,
                    drop_attention=2 * block in dropped,
                    drop_mlp=2 * block + 1 in dropped,
                )
            )
            for block in range(min(points) // 2, min(last + 1, num_layers))
        }

    return variants


def model_shape(reader: CheckpointReader) -> ModelShape:
    """The shape of the model that ``reader`` holds."""
    return ModelShape(reader.family, reader.config, reader.head_dim)


class BlockStreamer:
    """Advances streams through single blocks under any schedule, and scores them.

    ``micro_batch``: the most sequences that are computed at a time. All results are the same on every rank.
    """

    def __init__(
        self,
        reader: CheckpointReader,
        runtime: Runtime,
        dtype: torch.dtype,
        weights: BlockWeights,
        micro_batch: int = 8,
    ) -> None:
        self.reader = reader
        self.runtime = runtime
        self.dtype = dtype
        self.weights = weights
        self.micro_batch = micro_batch
        self.shape = model_shape(reader)
        self._units: dict[BlockSchedule, BlockUnit] = {}
        self._loaded: dict[BlockSchedule, int | Mapping[str, Tensor]] = {}
        self._block: int | None = None
        self._shard: Mapping[str, Tensor] = {}
        self._state: dict[str, Tensor] = {}
        self._head: OutputLayer | None = None

    @property
    def num_layers(self) -> int:
        return int(self.reader.config["num_hidden_layers"])

    def embed(self, tokens: Tensor) -> list[Tensor]:
        """``tokens`` [n, s] -> the stream in front of block 0."""
        table = self.reader.get(self.reader.family.embedding)
        if int(tokens.max()) >= len(table):
            raise UserError(f"token {int(tokens.max())} is outside the model's vocabulary of {len(table)}")
        together = self.micro_batch
        if self.runtime.device.type == "cpu":
            most = CPU_TOKENS * torch.get_num_threads()
            together = min(together, max(1, most // tokens.shape[1]))
        # Looked up as [s, b]: a transposed result looks contiguous for b = 1, but is multiplied several times slower.
        batches = [b.T for b in tokens.split(together)]
        positions = self._positions(tokens.shape[1])
        embedded = [F.embedding(b, table).to(self.runtime.device, self.dtype) for b in batches]
        return embedded if positions is None else [x + positions for x in embedded]

    def _positions(self, length: int) -> Tensor | None:
        """Learned position embeddings [s, 1, h], if the family has any. Raises UserError where they are too few."""
        learned = self.shape.family.positions
        if learned is None:
            return None
        rows = self.reader.get(learned.name)[learned.offset :]
        if length > len(rows):
            raise UserError(f"sequences of {length} tokens; the model has learned {len(rows)} positions")
        return rows[:length, None].to(self.runtime.device, self.dtype)

    def unit(
        self, block: int, schedule: BlockSchedule | None = None, own: Mapping[str, Tensor] | None = None
    ) -> BlockUnit:
        """A one-block unit (None: the stock tensor-parallel block) that holds block ``block``'s weights.

        ``own``: this rank's shard of other weights for the block, under Hugging Face names.
        """
        schedule = schedule or _STOCK
        if own is not None:
            return self._unit_of(schedule, own)
        if self._block != block:
            self.release()
            weights = self.weights(block)
            self._shard = shard_block(weights, self.shape.family, self.runtime.tp_rank, self.runtime.tp_size)
            self._block = block
        unit = self._built(schedule)
        if self._loaded.get(schedule) != block:
            # All units of a block refer to the same tensors: one block in memory, whatever the number of schedules.
            missing = [n for n, _ in unit.blocks.layers[0].named_parameters() if n not in self._state]
            self._state |= layer_state(self._shard, self.shape, self.runtime, self.dtype, missing)
            refer_to(unit.blocks.layers[0], self._state)
            self._loaded[schedule] = block
        return unit

    def release(self) -> None:
        """Let go of the block's weights, as happens before the next block's are read: units of schedules that are not
        used there would keep theirs. The next use of a block reads it again."""
        for schedule in self._loaded:
            layer = self._units[schedule].blocks.layers[0]
            refer_to(layer, {name: p.new_empty(0) for name, p in layer.named_parameters()})
        self._loaded.clear()
        self._shard, self._state, self._block = {}, {}, None

    def _built(self, schedule: BlockSchedule) -> BlockUnit:
        if schedule not in self._units:
            unit = BlockUnit(self.shape, [schedule], self.runtime, self.dtype, fused_attention=True)
            self._units[schedule] = unit.eval().requires_grad_(False)
        return self._units[schedule]

    def _unit_of(self, schedule: BlockSchedule, own: Mapping[str, Tensor]) -> BlockUnit:
        unit = self._built(schedule)
        if self._loaded.get(schedule) is not own:
            layer = unit.blocks.layers[0]
            names = [n for n, _ in layer.named_parameters()]
            refer_to(layer, layer_state(own, self.shape, self.runtime, self.dtype, names))
            self._loaded[schedule] = own
        return unit

    @torch.no_grad()
    def advance(self, block: int, stream: Sequence[Tensor]) -> list[Tensor]:
        """The stream behind ``block`` computed with all points kept."""
        unit = self.unit(block)
        return [unit.layer_forward(x, None)[0] for x in stream]

    @torch.no_grad()
    def advance_pending(
        self,
        block: int,
        schedule: BlockSchedule,
        stream: Sequence[Tensor],
        pending: Sequence[Tensor | None],
        own: Mapping[str, Tensor] | None = None,
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """X and P behind ``block`` under ``schedule``; P is None where the block ends synced. ``own``: as in
        :meth:`unit`."""
        unit = self.unit(block, schedule, own)
        results = [unit.layer_forward(x, p) for x, p in zip(stream, pending, strict=True)]
        return [x for x, _ in results], [p for _, p in results]

    @torch.no_grad()
    def sequence_nll(self, stream: Sequence[Tensor], tokens: Tensor) -> Tensor:
        """Sum of -log p, in nats, over the s - 1 scored positions of every sequence: float64 [n] on the CPU.

        ``stream``: what stands behind the last block for ``tokens`` [n, s]. Every sequence is scored on its own from
        its second token. Positions are shared out over the ranks. Raises UserError if a sum is not finite.
        """
        batches = tokens.split([x.shape[1] for x in stream])

        def score(index: int, mine: slice) -> Tensor:
            targets = batches[index][:, 1:].reshape(-1).to(self.runtime.device)
            return self._output_layer().negative_log_likelihood(_scored(stream[index])[mine], targets[mine])

        return self._sequence_sums(stream, score)

    @torch.no_grad()
    def sequence_kl(self, stream: Sequence[Tensor], plain: Sequence[Tensor]) -> Tensor:
        """Sum of KL(plain || stream), in nats, over the predictions that :meth:`sequence_nll` scores: float64 [n].

        ``plain``: the plain model's stream behind the last block. Raises as :meth:`sequence_nll`.
        """

        def score(index: int, mine: slice) -> Tensor:
            rows, reference = (_scored(states[index])[mine] for states in (stream, plain))
            return self._output_layer().divergence(rows, reference)

        return self._sequence_sums(stream, score)

    def _sequence_sums(self, stream: Sequence[Tensor], score: Callable[[int, slice], Tensor]) -> Tensor:
        """Sums [n] over each sequence of ``score(batch number, positions) -> [t]``; every rank scores its positions."""
        rank, ranks = self.runtime.tp_rank, self.runtime.tp_size
        parts = []
        for index, x in enumerate(stream):
            count = (x.shape[0] - 1) * x.shape[1]
            mine = slice(count * rank // ranks, count * (rank + 1) // ranks)
            scores = torch.zeros(count, dtype=torch.float64, device=x.device)
            scores[mine] = score(index, mine)
            parts.append(scores.view(x.shape[1], -1).sum(1))
        sums = all_reduce(torch.cat(parts), self.runtime.tp_group).cpu()
        if not bool(sums.isfinite().all()):
            raise UserError(
                "the perplexity is not finite: the model's activations overflow or hold NaN on this text; "
                "check the checkpoint, or use --dtype fp32"
            )
        return sums

    def perplexity(self, stream: Sequence[Tensor], tokens: Tensor) -> tuple[float, int]:
        """Perplexity of ``tokens`` [n, s] given the stream behind the last block, and the number of tokens scored.

        Raises as :meth:`sequence_nll`.
        """
        count = tokens.numel() - len(tokens)
        return perplexity_of(float(self.sequence_nll(stream, tokens).sum()) / count), count

    def _output_layer(self) -> OutputLayer:
        if self._head is None:
            device, dtype = self.runtime.device, self.dtype
            self._head = OutputLayer(
                self.reader.final_norm().to(device, dtype), self.reader.output_table().to(device, dtype)
            )
        return self._head


def perplexity_of(mean: float) -> float:
    """The perplexity of a mean negative log-likelihood in nats. A ruined schedule on an extreme model may leave the
    range of exp; it ranks last all the same."""
    return math.exp(min(mean, 700.0))


def _scored(x: Tensor) -> Tensor:
    """The hidden states [b * (s - 1), h] behind the scored predictions of a micro-batch [s, b, h]."""
    return x[:-1].transpose(0, 1).reshape(-1, x.shape[-1])
