"""The finishing pass: the whole SPD model learns the plain model's next-token distribution.

Block-to-block distillation asks of a block what the plain block does; this pass asks of the model what the plain
model says: ``KL(plain || SPD)`` of every prediction, the first one included, in the same DeepSpeed engine. Only
blocks in which something is dropped or pending train; the embedding, the final norm and the output layer stay as
they are.

The plain model's final hidden states are streamed some steps ahead, block by block, and kept; its logits are made
from them where they are needed. The student itself is in memory whole: its shard of the weights, and gradients and
optimizer state of what trains, besides the activations of all blocks (``recompute`` keeps those of one).
"""

from __future__ import annotations

import gc
import itertools
import math
import time
from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor, nn

from megatron_spd.calibration.stream import BlockStreamer, BlockWeights
from megatron_spd.comm.all_reduce import all_reduce
from megatron_spd.distill.batches import example_order, replica_batches
from megatron_spd.distill.checkpoints import Checkpoints
from megatron_spd.distill.engine import deepspeed_config, end_engine, make_engine, use_outside
from megatron_spd.distill.gather import full_block
from megatron_spd.distill.kl import vocabulary_parallel_kl
from megatron_spd.distill.loop import BestState, TrainingLoop
from megatron_spd.distill.settings import FinishSettings
from megatron_spd.distill.tracking import Tracker
from megatron_spd.distill.units import FinishStore
from megatron_spd.errors import UserError
from megatron_spd.models.build import DTYPES, ModelShape, build_gpt_model, causal_mask, vocabulary_rows
from megatron_spd.plan import SPDPlan
from megatron_spd.runtime.distributed import Runtime, tensor_parallel_seed

#: Sequences whose answers of the plain model are streamed together, each block read once for all of them.
AHEAD = 64

_RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def blocks_to_finish(plan: SPDPlan) -> list[int]:
    """The blocks in which something is dropped or pending."""
    schedules = map(plan.block_schedule, range(plan.num_layers))
    return [i for i, s in enumerate(schedules) if s.pending or s.drop_attention or s.drop_mlp]


def finish(
    streamer: BlockStreamer,
    plan: SPDPlan,
    tokens: Tensor,
    settings: FinishSettings,
    store: FinishStore,
    tracker: Tracker,
    weights: BlockWeights,
) -> dict[str, Any]:
    """Train the whole model under ``plan`` on the plain model's logits; leave the blocks in ``store``, if they got
    better.

    ``streamer`` walks the plain model; ``weights``: what the student starts from, in the plan's order. ``tokens``
    [n, s]. The record has ``blocks``, the held-out ``kl_before`` and ``kl_after`` (of the best state) in nats per
    token, ``best_step``, ``kept`` (False where no state was better than the first), the ``losses`` of the steps,
    and ``held_out``, [step, KL] of every judgement. A killed pass goes on from its last checkpoint and ends with
    the same weights.

    Raises UserError for too little text and where the KL divergence is not finite.
    """
    runtime = streamer.runtime
    record = runtime.from_main(store.record() if runtime.is_main else None)
    if record is not None:
        return record
    blocks = blocks_to_finish(plan)
    record = {"blocks": blocks, "which": settings.which, "kept": False, "losses": [], "held_out": []}
    if blocks:
        settings.check_amount(tokens, runtime.dp_size)
        record |= _Pass(streamer, plan, tokens, settings, tracker, weights).run(store)
    store.save_record(record, runtime)
    runtime.barrier()
    return record


class _Student(nn.Module):
    """A GPTModel under ``plan`` whose forward gives the loss; what does not train needs no gradient."""

    def __init__(
        self,
        shape: ModelShape,
        plan: SPDPlan,
        settings: FinishSettings,
        model: GPTModel,
        runtime: Runtime,
    ) -> None:
        super().__init__()
        self.model, self.runtime, self.recompute = model, runtime, settings.recompute
        self.requires_grad_(False)
        vectors = {entry.name for entry in shape.family.branch_tensors}
        for block in blocks_to_finish(plan):
            for name, parameter in model.decoder.layers[block].named_parameters():
                is_vector = name in vectors or "layernorm" in name
                parameter.requires_grad_(settings.which == "blocks" or is_vector)
        self._rotary = getattr(model, "rotary_pos_emb", None)  # learned positions are in the embedding
        tied = model.share_embeddings_and_output_weights
        table = model.embedding.word_embeddings.weight if tied else model.output_layer.weight
        self._table = [table]  # in a list: the parameter has its name already
        use_outside(self, table)
        self._rows = vocabulary_rows(len(table), shape.hf_config["vocab_size"], runtime)

    def forward(self, tokens: Tensor, teacher: Tensor) -> Tensor:
        """Mean KL divergence, in nats, for ``tokens`` [b, s] and the plain model's states behind its last block
        [s, b, h]."""
        length = tokens.shape[1]
        device = self.runtime.device
        positions = torch.arange(length, device=device).expand_as(tokens)
        x = self.model.embedding(input_ids=tokens, position_ids=positions)
        if self.recompute and self.training:
            # A checkpointed function passes gradients on only if one of its inputs needs them.
            x = x.detach().requires_grad_()
        rotary = None if self._rotary is None else self._rotary(length)
        states = self.model.decoder(x, attention_mask=causal_mask(length, device), rotary_pos_emb=rotary)
        with torch.no_grad():
            wanted = self.model.decoder.final_layernorm(teacher)
        return vocabulary_parallel_kl(states, wanted, self._table[0][: self._rows], self.runtime.tp_group)


class _Pass:
    """One finishing pass."""

    def __init__(
        self,
        streamer: BlockStreamer,
        plan: SPDPlan,
        tokens: Tensor,
        settings: FinishSettings,
        tracker: Tracker,
        weights: BlockWeights,
    ) -> None:
        self.started = time.monotonic()
        self.streamer, self.plan, self.settings, self.tracker = streamer, plan, settings, tracker
        self.runtime, self.tokens = streamer.runtime, tokens
        self.dtype = DTYPES[settings.engine.dtype]
        self.micro_batch = settings.batching()[0]
        self.training = len(tokens) - settings.held_out_count(len(tokens))
        self.steps = self._batches()
        self.judges = self._judges()
        #: Streamed answers of the plain model [s, h] on the CPU, by sequence.
        self.states: dict[int, Tensor] = {}
        self.names: dict[int, list[str]] = {}
        self.student = self._build(weights)

    def _batches(self) -> list[list[Tensor]]:
        count = self.settings.examples(self.training, self.tokens.shape[1])
        order = example_order(self.training, count, self.settings.seed * 1_000_003 + self.plan.num_layers)
        return replica_batches(order, self.settings, self.runtime.dp_rank, self.runtime.dp_size)

    def _judges(self) -> list[tuple[Tensor, int]]:
        """This replica's micro-batches of what judges, each with its weight. All replicas have equally many, so that
        ZeRO-3 may gather weights in each: one that has nothing left looks at the last sequence for nothing."""
        held_out, size = torch.arange(self.training, len(self.tokens)), self.runtime.dp_size
        own = held_out[self.runtime.dp_rank :: size].split(self.micro_batch)
        batches = [(batch, len(batch)) for batch in own if len(batch)]
        missing = -(-len(held_out) // (size * self.micro_batch)) - len(batches)
        return batches + [(held_out[-1:], 0)] * missing

    def _answers(self, sequences: Tensor) -> Tensor:
        """The plain model's states behind its last block [s, b, h] for ``sequences`` [b] of this replica.

        They are streamed for as many steps ahead as are cheap to keep, so that a pass that time cuts short has not paid
        for what it never used."""
        if any(i not in self.states for i in sequences.tolist()):
            self._stream_ahead(sequences)
        return torch.stack([self.states[i] for i in sequences.tolist()], 1)

    def _stream_ahead(self, sequences: Tensor) -> None:
        wanted = dict.fromkeys(i for i in sequences.tolist() if i not in self.states)
        coming = dict.fromkeys(i for step in self.steps for batch in step for i in batch.tolist())
        after = itertools.dropwhile(lambda i: i not in wanted, coming)
        ahead = (i for i in after if i not in self.states)
        numbers = sorted({*wanted, *itertools.islice(ahead, AHEAD)})
        stream = self.streamer.embed(self.tokens[numbers])
        for block in range(self.plan.num_layers):
            stream = self.streamer.advance(block, stream)
        rows = (sequence.to("cpu", self.dtype) for x in stream for sequence in x.unbind(1))
        self.states |= dict(zip(numbers, rows, strict=True))

    def _build(self, weights: BlockWeights) -> _Student:
        reader, shape = self.streamer.reader, self.streamer.shape

        def noted(block: int) -> Mapping[str, Tensor]:
            given = weights(block)
            self.names[block] = list(given)
            return given

        overrides: dict[str, Any] = dict(_RECOMPUTE) if self.settings.recompute else {}
        model = build_gpt_model(shape, self.plan, noted, reader.get, self.runtime, self.dtype, **overrides)
        return _Student(shape, self.plan, self.settings, model, self.runtime)

    def run(self, store: FinishStore) -> dict[str, Any]:
        """Train, and leave the best state's blocks in ``store`` if it is not the first; the rest of the record."""
        self._stream_ahead(torch.cat([batch for batch, _ in self.judges]))
        before = self._held_out_kl()
        if not math.isfinite(before):
            raise UserError(
                "the KL divergence between the plain and the SPD model is not finite on this text: activations "
                "overflow or hold NaN; check the checkpoint, or use --dtype fp32"
            )
        best = BestState(self.student, before)
        engine = make_engine(self.student, deepspeed_config(self.settings.engine, len(self.steps)))
        tensor_parallel_seed(self.settings.seed)
        loop = TrainingLoop(
            self.runtime,
            engine,
            lambda batch: engine(*self._examples(batch)),
            self._held_out_kl,
            best,
            self.tracker,
            "finish",
            "finish",
        )
        checkpoints = Checkpoints(store.unfinished, self.runtime)
        checkpoints.load(loop)
        seconds = self.settings.max_seconds
        if seconds is not None:
            seconds -= time.monotonic() - self.started
        loop.run(self.steps, seconds, lambda: checkpoints.save_if_due(loop))
        best.restore()
        if best.step:
            self._save_blocks(store)
        end_engine(engine)
        checkpoints.remove()
        gc.collect()
        return {
            "kl_before": before,
            "kl_after": best.loss,
            "best_step": best.step,
            "kept": best.step > 0,
            "losses": loop.losses,
            "held_out": loop.held_out,
        }

    def _examples(self, sequences: Tensor) -> tuple[Tensor, Tensor]:
        device = self.runtime.device
        teacher = self._answers(sequences)
        return self.tokens[sequences].to(device), teacher.to(device)

    @torch.no_grad()
    def _held_out_kl(self) -> float:
        """Mean over what judges; replicas share it."""
        self.student.eval()
        total = torch.zeros(2, dtype=torch.float64, device=self.runtime.device)
        for batch, weight in self.judges:
            kl = self.student(*self._examples(batch)).double()
            total += torch.stack([kl, torch.ones_like(kl)]) * weight
        summed, count = all_reduce(total, self.runtime.dp_group).tolist()
        # The ranks must agree to the bit on what is best.
        return self.runtime.from_main(summed / count)

    def _save_blocks(self, store: FinishStore) -> None:
        for block in blocks_to_finish(self.plan):
            layer = self.student.model.decoder.layers[block]
            full = full_block(layer, self.names[block], self.streamer.shape, self.plan.branches, self.runtime)
            store.save_block(block, full, self.runtime)
