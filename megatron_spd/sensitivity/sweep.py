"""What dropping sync points costs: Algorithm 1 of the SPD paper (section 4), and every sync point alone; and what a
low-bit all-reduce at a sync point alone costs, for any number of formats.

All candidates share the original hidden states up to their first changed point, so each is a stream that
starts there. The sweep walks the blocks once, first to last, and advances all streams that have started: a
block's weights are read once, and a candidate costs only the blocks behind its start.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_spd.calibration.stream import BlockStreamer, UnitVariants, perplexity_of, plain_variants
from megatron_spd.files import write_atomic
from megatron_spd.models.weights import join_branches
from megatron_spd.plan import BlockSchedule, branches_of_rank
from megatron_spd.progress import progress_bar
from megatron_spd.sensitivity.low_bit import check_low_bit_measurable, with_low_bit
from megatron_spd.sensitivity.tiers import droppable_points, sync_points

Method = Literal["algorithm1", "single", "both"]
#: perplexity: the paper's. kl: the perplexity that the divergence from the plain model stands for (see ``measure.py``).
Measure = Literal["perplexity", "kl"]
Which = Literal["attention", "mlp", "any"]

#: Seconds between two saves of an unfinished sweep.
_SAVE_EVERY = 120.0

_Stream = tuple[list[Tensor], list[Tensor | None]]


@dataclass(frozen=True)
class _Candidates:
    """What is measured: Algorithm 1's start blocks, points dropped alone, (point, format) of points low-bit alone."""

    starts: set[int]
    points: set[int]
    low_bit: list[tuple[int, str]]

    def steps(self, blocks: int) -> int:
        """Block passes needed up to block ``blocks``: the unit of the progress bar."""
        first_blocks = [*self.starts, *(p // 2 for p in self.points), *(p // 2 for p, _ in self.low_bit)]
        return blocks + sum(max(0, blocks - b) for b in first_blocks)


@dataclass
class _State:
    """Streams in front of block ``block``: the original one, Algorithm 1's by start block, single points' by point,
    and those of low-bit points by point and format."""

    block: int
    plain: list[Tensor]
    algorithm1: dict[int, list[Tensor]]
    single: dict[int, _Stream]
    low_bit: dict[tuple[int, str], list[Tensor]]


def sweep(
    streamer: BlockStreamer,
    tokens: Tensor,
    branches: int,
    method: Method = "both",
    which: Which = "any",
    unfinished: Path | None = None,
    order: str = "",
    variants: UnitVariants | None = None,
    measure: Measure = "perplexity",
    collectives: Sequence[str] = (),
) -> dict[str, Any]:
    """Measure the perplexity of ``tokens`` [n, s] under each candidate drop, and with each low-bit all-reduce.

    ``algorithm1``: attention points of blocks i..L-1 dropped, for every i. ``single``: one point of ``which``
    dropped. The weights are those that ``streamer`` walks (grouped ones if it permutes). ``unfinished``:
    where to save the streams now and then, so that a killed sweep of the same model, text and candidates goes
    on from there, under any M; the file is removed at the end. ``order`` tells apart sweeps whose streamers
    put the model's weights in another order. ``variants``: calibrated weights of the blocks that a dropped point
    touches (``order`` must then tell them apart too); default: the streamer's own. ``collectives``: low-bit formats
    (see ``collective.py``), each measured at every point of ``which``, the last MLP point included, nothing dropped.

    Returns a JSON-able dict: ``plain_perplexity``, ``algorithm1``, ``single`` and ``low_bit`` lists with ``perplexity``
    and ``sensitivity`` (increase of perplexity: against one block fewer for Algorithm 1, against the plain
    model for a single point).

    Raises UserError for formats under a number of ranks that rounds otherwise than G ranks.
    """
    num_layers = streamer.num_layers
    if collectives:
        check_low_bit_measurable(streamer, branches, tokens)
    candidates = _candidates(num_layers, method, which, collectives)
    identity = _identity(streamer, tokens, order, branches, method, which, list(collectives))
    state = _resume(streamer, identity, unfinished) or _State(0, streamer.embed(tokens), {}, {}, {})
    saved = time.monotonic()
    with progress_bar(streamer.runtime, "sensitivity", candidates.steps(num_layers), "step") as bar:
        bar.update(candidates.steps(state.block))
        while state.block < num_layers:
            _advance(streamer, state, variants or plain_variants(branches, num_layers), candidates)
            _advance_low_bit(streamer, state, branches, candidates)
            state.plain = streamer.advance(state.block, state.plain)
            state.block += 1
            bar.update(candidates.steps(state.block) - bar.n if not bar.disable else 0)
            if unfinished is not None and streamer.runtime.from_main(time.monotonic() - saved > _SAVE_EVERY):
                _save(streamer, state, branches, identity, unfinished)
                saved = time.monotonic()
        result = _score(streamer, state, tokens, measure, bar)
    result |= {"branches": branches, "method": method, "sync_points": which, "sequences": len(tokens)}
    result |= {"seq_length": tokens.shape[1], "num_layers": num_layers, "measure": measure}
    if unfinished is not None and streamer.runtime.is_main:
        unfinished.unlink(missing_ok=True)
    return result


def _candidates(num_layers: int, method: Method, which: Which, collectives: Sequence[str]) -> _Candidates:
    points = droppable_points(num_layers, which) if method in ("single", "both") else []
    starts = range(num_layers) if method in ("algorithm1", "both") else ()
    low_bit = [(point, name) for point in sync_points(num_layers, which) for name in collectives]
    return _Candidates(set(starts), set(points), low_bit)


def _advance(streamer: BlockStreamer, state: _State, variants: UnitVariants, candidates: _Candidates) -> None:
    """All streams with drops through block ``state.block``; those that start there begin."""
    block = state.block
    attention, mlp = 2 * block, 2 * block + 1
    none: list[Tensor | None] = [None] * len(state.plain)

    def run(point: int, x: Sequence[Tensor], pending: Sequence[Tensor | None]) -> _Stream:
        variant = variants((point,))[block]
        return streamer.advance_pending(block, variant.schedule, x, pending, variant.own)

    for start, x in state.algorithm1.items():
        state.algorithm1[start] = run(attention, x, none)[0]
    for point, (x, pending) in state.single.items():
        if pending[0] is None:
            state.single[point] = (streamer.advance(block, x), none)
        else:
            state.single[point] = run(point, x, pending)
    if block in candidates.starts or attention in candidates.points:
        begun = run(attention, state.plain, none)
        if block in candidates.starts:
            state.algorithm1[block] = begun[0]
        if attention in candidates.points:
            state.single[attention] = begun
    if mlp in candidates.points:
        state.single[mlp] = run(mlp, state.plain, none)


def _advance_low_bit(streamer: BlockStreamer, state: _State, branches: int, candidates: _Candidates) -> None:
    """All streams with a low-bit point through block ``state.block``; those that start there begin. Behind their
    point they are synced."""
    block, none = state.block, [None] * len(state.plain)
    for key, x in state.low_bit.items():
        state.low_bit[key] = streamer.advance(block, x)
    for point, name in candidates.low_bit:
        if point // 2 == block:
            schedule = with_low_bit(BlockSchedule(branches), block, {point: name})
            state.low_bit[point, name] = streamer.advance_pending(block, schedule, state.plain, none)[0]


def _score(
    streamer: BlockStreamer, state: _State, tokens: Tensor, measure: Measure, bar: Any
) -> dict[str, Any]:
    bar.set_postfix_str("scoring")
    plain, count = streamer.perplexity(state.plain, tokens)

    def score(stream: list[Tensor]) -> float:
        if measure == "perplexity":
            return streamer.perplexity(stream, tokens)[0]
        return plain * perplexity_of(float(streamer.sequence_kl(stream, state.plain).sum()) / count)

    bar.reset(total=len(state.algorithm1) + len(state.single) + len(state.low_bit))
    algorithm1, single, low_bit = [], [], []
    previous = plain
    for block in sorted(state.algorithm1, reverse=True):
        perplexity = score(state.algorithm1[block])
        algorithm1.append({"block": block, "perplexity": perplexity, "sensitivity": perplexity - previous})
        previous = perplexity
        bar.update()
    for point in sorted(state.single):
        perplexity = score(state.single[point][0])
        single.append(_place(point) | {"perplexity": perplexity, "sensitivity": perplexity - plain})
        bar.update()
    for (point, name), stream in state.low_bit.items():
        perplexity = score(stream)
        figures = {"perplexity": perplexity, "sensitivity": perplexity - plain}
        low_bit.append(_place(point) | {"collective": name} | figures)
        bar.update()
    return {
        "plain_perplexity": plain,
        "tokens": count,
        "algorithm1": algorithm1[::-1] or None,
        "single": single or None,
        "low_bit": low_bit or None,
    }


def _place(point: int) -> dict[str, Any]:
    return {"point": point, "block": point // 2, "kind": "mlp" if point % 2 else "attention"}


def _identity(streamer: BlockStreamer, tokens: Tensor, order: str, *candidates: Any) -> str:
    """A hash of what decides the streams; M, and where the model lies, do not."""
    facts = [streamer.reader.fingerprint(), order, str(streamer.dtype), streamer.micro_batch, *candidates]
    return hashlib.sha256(json.dumps(facts).encode() + tokens.numpy().tobytes()).hexdigest()


def _save(streamer: BlockStreamer, state: _State, branches: int, identity: str, path: Path) -> None:
    """Keep the streams in one file. Called on every rank: each holds the pending sums of its own branches only."""
    single = {
        p: (x, [_all_branches(t, branches, streamer) for t in pending])
        for p, (x, pending) in state.single.items()
    }
    if streamer.runtime.is_main:
        streams = (identity, state.block, state.plain, state.algorithm1, single, state.low_bit)
        write_atomic(path, lambda temporary: torch.save(streams, temporary))


def _resume(streamer: BlockStreamer, identity: str, path: Path | None) -> _State | None:
    """The streams that :func:`_save` kept at ``path``, or None if there are none or they are another sweep's."""
    # The main rank decides, so that all ranks start at the same block.
    if path is None or not streamer.runtime.from_main(path.is_file()):
        return None
    held, *streams = torch.load(path, map_location=streamer.runtime.device, weights_only=True)
    if held != identity:
        return None
    block, plain, algorithm1, single, low_bit = streams
    mine = {p: (x, [_own_branches(t, streamer) for t in pending]) for p, (x, pending) in single.items()}
    return _State(block, plain, algorithm1, mine, low_bit)


def _all_branches(pending: Tensor | None, branches: int, streamer: BlockStreamer) -> Tensor | None:
    """Pending sums [G, s, b, h] of all branches from each rank's own [B, s, b, h]."""
    if pending is None or streamer.runtime.tp_size == 1:
        return pending
    parts = [torch.empty_like(pending) for _ in range(streamer.runtime.tp_size)]
    dist.all_gather(parts, pending.contiguous(), group=streamer.runtime.tp_group)
    return join_branches(parts, branches)


def _own_branches(pending: Tensor | None, streamer: BlockStreamer) -> Tensor | None:
    """The inverse of :func:`_all_branches`."""
    if pending is None:
        return None
    return pending[branches_of_rank(len(pending), streamer.runtime.tp_rank, streamer.runtime.tp_size)]
