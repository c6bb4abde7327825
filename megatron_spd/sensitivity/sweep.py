"""What dropping sync points costs: Algorithm 1 of the SPD paper (section 4), and every sync point alone.

All candidates share the original hidden states up to their first dropped point, so each is a stream that
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
from megatron_spd.progress import progress_bar
from megatron_spd.sensitivity.tiers import droppable_points

Method = Literal["algorithm1", "single", "both"]
#: perplexity: the paper's. kl: the perplexity that the divergence from the plain model stands for (see ``measure.py``).
Measure = Literal["perplexity", "kl"]
Which = Literal["attention", "mlp", "any"]

#: Seconds between two saves of an unfinished sweep.
_SAVE_EVERY = 120.0

_Stream = tuple[list[Tensor], list[Tensor | None]]


@dataclass
class _State:
    """Streams in front of block ``block``: the original one, Algorithm 1's by start block, single points' by point."""

    block: int
    plain: list[Tensor]
    algorithm1: dict[int, list[Tensor]]
    single: dict[int, _Stream]


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
) -> dict[str, Any]:
    """Measure the perplexity of ``tokens`` [n, s] under each candidate drop.

    ``algorithm1``: attention points of blocks i..L-1 dropped, for every i. ``single``: one point of ``which``
    dropped. The weights are those that ``streamer`` walks (grouped ones if it permutes). ``unfinished``:
    where to save the streams now and then, so that a killed sweep of the same model, text and candidates goes
    on from there, under any M; the file is removed at the end. ``order`` tells apart sweeps whose streamers
    put the model's weights in another order. ``variants``: calibrated weights of the blocks that a dropped point
    touches (``order`` must then tell them apart too); default: the streamer's own.

    Returns a JSON-able dict: ``plain_perplexity``, ``algorithm1`` and ``single`` lists with ``perplexity``
    and ``sensitivity`` (increase of perplexity: against one block fewer for Algorithm 1, against the plain
    model for a single point).
    """
    num_layers = streamer.num_layers
    points = set(droppable_points(num_layers, which)) if method in ("single", "both") else set()
    starts = set(range(num_layers)) if method in ("algorithm1", "both") else set()
    identity = _identity(streamer, tokens, order, branches, method, which)
    state = _resume(streamer, identity, unfinished) or _State(0, streamer.embed(tokens), {}, {})
    saved = time.monotonic()
    with progress_bar(streamer.runtime, "sensitivity", _steps(num_layers, starts, points), "step") as bar:
        bar.update(_steps(state.block, starts, points))
        while state.block < num_layers:
            _advance(streamer, state, variants or plain_variants(branches, num_layers), starts, points)
            bar.update(_steps(state.block, starts, points) - bar.n if not bar.disable else 0)
            if unfinished is not None and streamer.runtime.from_main(time.monotonic() - saved > _SAVE_EVERY):
                _save(streamer, state, identity, unfinished)
                saved = time.monotonic()
        result = _score(streamer, state, tokens, measure, bar)
    result |= {"branches": branches, "method": method, "sync_points": which, "sequences": len(tokens)}
    result |= {"seq_length": tokens.shape[1], "num_layers": num_layers, "measure": measure}
    if unfinished is not None and streamer.runtime.is_main:
        unfinished.unlink(missing_ok=True)
    return result


def _steps(blocks: int, starts: set[int], points: set[int]) -> int:
    """Block passes needed up to block ``blocks``: the unit of the progress bar."""
    first_blocks = [*starts, *(p // 2 for p in points)]
    return blocks + sum(max(0, blocks - b) for b in first_blocks)


def _advance(
    streamer: BlockStreamer, state: _State, variants: UnitVariants, starts: set[int], points: set[int]
) -> None:
    """All streams through block ``state.block``; those that start there begin."""
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
    if block in starts or attention in points:
        begun = run(attention, state.plain, none)
        if block in starts:
            state.algorithm1[block] = begun[0]
        if attention in points:
            state.single[attention] = begun
    if mlp in points:
        state.single[mlp] = run(mlp, state.plain, none)
    state.plain = streamer.advance(block, state.plain)
    state.block += 1


def _score(
    streamer: BlockStreamer, state: _State, tokens: Tensor, measure: Measure, bar: Any
) -> dict[str, Any]:
    bar.set_postfix_str("scoring")
    plain, count = streamer.perplexity(state.plain, tokens)

    def score(stream: list[Tensor]) -> float:
        if measure == "perplexity":
            return streamer.perplexity(stream, tokens)[0]
        return plain * perplexity_of(float(streamer.sequence_kl(stream, state.plain).sum()) / count)

    bar.reset(total=len(state.algorithm1) + len(state.single))
    algorithm1, single = [], []
    previous = plain
    for block in sorted(state.algorithm1, reverse=True):
        perplexity = score(state.algorithm1[block])
        algorithm1.append({"block": block, "perplexity": perplexity, "sensitivity": perplexity - previous})
        previous = perplexity
        bar.update()
    for point in sorted(state.single):
        perplexity = score(state.single[point][0])
        kind = "mlp" if point % 2 else "attention"
        entry = {"point": point, "block": point // 2, "kind": kind, "perplexity": perplexity}
        single.append(entry | {"sensitivity": perplexity - plain})
        bar.update()
    return {
        "plain_perplexity": plain,
        "tokens": count,
        "algorithm1": algorithm1[::-1] or None,
        "single": single or None,
    }


def _identity(streamer: BlockStreamer, tokens: Tensor, order: str, *candidates: Any) -> str:
    """A hash of what decides the streams; M, and where the model lies, do not."""
    facts = [streamer.reader.fingerprint(), order, str(streamer.dtype), streamer.micro_batch, *candidates]
    return hashlib.sha256(json.dumps(facts).encode() + tokens.numpy().tobytes()).hexdigest()


def _save(streamer: BlockStreamer, state: _State, identity: str, path: Path) -> None:
    """Keep the streams in one file. Called on every rank: each holds the pending sums of its own branches only."""
    single = {
        p: (x, [_all_branches(t, streamer) for t in pending]) for p, (x, pending) in state.single.items()
    }
    if streamer.runtime.is_main:
        streams = (identity, state.block, state.plain, state.algorithm1, single)
        write_atomic(path, lambda temporary: torch.save(streams, temporary))


def _resume(streamer: BlockStreamer, identity: str, path: Path | None) -> _State | None:
    """The streams that :func:`_save` kept at ``path``, or None if there are none or they are another sweep's."""
    # The main rank decides, so that all ranks start at the same block.
    if path is None or not streamer.runtime.from_main(path.is_file()):
        return None
    held, block, plain, algorithm1, single = torch.load(
        path, map_location=streamer.runtime.device, weights_only=True
    )
    if held != identity:
        return None
    mine = {p: (x, [_own_branches(t, streamer) for t in pending]) for p, (x, pending) in single.items()}
    return _State(block, plain, algorithm1, mine)


def _all_branches(pending: Tensor | None, streamer: BlockStreamer) -> Tensor | None:
    """Pending sums [G, s, b, h] of all branches from each rank's own [G/M, s, b, h]."""
    if pending is None or streamer.runtime.tp_size == 1:
        return pending
    parts = [torch.empty_like(pending) for _ in range(streamer.runtime.tp_size)]
    dist.all_gather(parts, pending.contiguous(), group=streamer.runtime.tp_group)
    return torch.cat(parts)


def _own_branches(pending: Tensor | None, streamer: BlockStreamer) -> Tensor | None:
    """The inverse of :func:`_all_branches`."""
    return None if pending is None else pending.chunk(streamer.runtime.tp_size)[streamer.runtime.tp_rank]
