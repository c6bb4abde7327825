"""What one rank holds at the fullest moment of each stage, tensor by tensor, as the stages' own code allocates it.

Sizes are in bytes. T tokens of hidden states are ``T * hidden * itemsize``; a *stream* is that for a whole text (see
``calibration/stream.py``). Not counted: PyTorch itself, the communication library's buffers, fragmentation.
``tests/unit/scale/test_memory.py`` holds these sums against what small runs allocate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_spd.calibration.scoring import COLUMNS, ROWS
from megatron_spd.distill.engine import BUCKET
from megatron_spd.distill.finish import AHEAD
from megatron_spd.distill.kl import ROWS as KL_ROWS
from megatron_spd.grouping.provider import CACHE_BYTES
from megatron_spd.scale.setup import Setup
from megatron_spd.sensitivity.measure import TRACES

_FP32, _FP64 = 4, 8
#: Matrices [G, h, h] in float64 while a re-fit is solved: two sums, two covariances, and a temporary of either.
_FIT_MATRICES = 6


@dataclass(frozen=True)
class Part:
    """Something that a rank holds: on its ``device``, or on the ``host`` (the same on a machine without GPUs)."""

    name: str
    bytes: int
    place: Literal["device", "host"] = "device"


def stage_memory(setup: Setup) -> dict[str, list[Part]]:
    """The parts of every stage of ``run`` under ``setup``, by the stage's name, in order."""
    known = (sensitivity, search, calibration, distillation, finishing, export)
    return {stage.__name__: stage(setup) for stage in known if stage.__name__ in setup.stages}


def sensitivity(setup: Setup) -> list[Part]:
    """The sweep in front of its last block: a stream for every candidate (``sensitivity/sweep.py``)."""
    candidates = setup.droppable + setup.low_bit_candidates
    stream = _states(setup, setup.measured_tokens)
    pending = 0 if setup.options.sync_points == "attention" else setup.local_branches
    computing = [
        Part("stream behind the block, pending sums", (1 + pending) * stream),
        Part("computing one batch", _forward(setup, setup.streamed_together)),
    ]
    return [
        Part(f"{candidates + 1} streams", (candidates + 1) * stream),
        *_block_parts(setup),
        *_with_candidate_units(setup, setup.droppable, computing),
    ]


def search(setup: Setup) -> list[Part]:
    """Sets measured from the states in front of each block of the last few sets (``sensitivity/measure.py``)."""
    stream = _states(setup, setup.measured_tokens)
    sets = min(TRACES, setup.options.sets_to_measure)
    computing = [
        Part("pending sums", 2 * setup.local_branches * stream),
        Part("computing one batch", _forward(setup, setup.streamed_together)),
    ]
    return [
        Part(f"states in front of every block, {sets} sets", sets * (setup.size.layers + 1) * stream),
        *_block_parts(setup),
        *_head(setup),
        *_with_candidate_units(setup, setup.dropped, computing),
    ]


def calibration(setup: Setup) -> list[Part]:
    """The unit at hand with the streams in front of it (``grouping/walk.py``)."""
    streams = _states(setup, setup.calibration_tokens)
    return [
        Part("streams", streams),
        *_block_parts(setup),
        *_calibrating(setup),
    ]


def distillation(setup: Setup) -> list[Part]:
    """One unit with its optimizer between the streams, of which no block is kept meanwhile (``distill/recipe.py``)."""
    unit = setup.unit_blocks * setup.size.block_on(setup.ranks)
    # In front of the unit and behind it, the teacher's and the student's; and joined for random access.
    streams = 4 if setup.options.inputs == "teacher" else 5 if setup.options.inputs == "student" else 6
    return [
        Part(f"{streams} streams", streams * _states(setup, setup.distill_tokens)),
        Part("unit", unit * setup.itemsize),
        *_optimizer(setup, unit, unit, setup.unit_blocks * _saved(setup) + _backward(setup)),
        # The host reads whole blocks before it has a best state to keep.
        Part("best state", max(unit * setup.itemsize, setup.size.block * setup.size.stored_bytes), "host"),
    ]


def finishing(setup: Setup) -> list[Part]:
    """The whole student (``distill/finish.py``), if every block has a drop."""
    size, recompute = setup.size, setup.options.finish_recompute
    blocks = size.layers * size.block_on(setup.ranks)
    vectors = size.layers * (size.replicated + 6 * setup.local_branches * size.hidden)
    trained = blocks if setup.options.finish == "blocks" else vectors
    ends = (1 if size.tied else 2) * size.table // setup.ranks
    inputs = size.layers * _states(setup, setup.micro_batch) * (1 + setup.local_branches)
    saved = inputs + _saved(setup) if recompute else size.layers * _saved(setup)
    activations = saved + _backward(setup)
    logits = 2 * min(KL_ROWS, setup.micro_batch) * size.vocabulary // setup.ranks
    return [
        Part("model", (blocks + ends) * setup.itemsize),
        *_optimizer(setup, trained, blocks + ends, activations),
        Part("logits of some positions", logits * (setup.itemsize + 3 * _FP32)),
        *_block_parts(setup),
        Part(
            "answers being streamed",
            3 * _states(setup, min(AHEAD * setup.length, setup.finish_tokens)),
        ),
        Part("answers of the plain model", _states(setup, setup.finish_tokens), "host"),
        Part("best state", trained * setup.itemsize, "host"),
    ]


def export(setup: Setup) -> list[Part]:
    """On the main rank: the block that is being put in order; or the embedding, if that is larger."""
    largest = max(2 * setup.size.block, setup.size.table)
    return [Part("block, read and in its new order", largest * setup.size.stored_bytes, "host")]


# ---- what stages share ------------------------------------------------------------------------------------------


def _states(setup: Setup, tokens: int) -> int:
    return tokens * setup.size.hidden * setup.itemsize


def _block_parts(setup: Setup) -> list[Part]:
    """A block as every rank reads it, and its own part of it."""
    size = setup.size
    return [
        Part("block as stored", size.block * size.stored_bytes, "host"),
        Part("block of this rank", size.block_on(setup.ranks) * setup.itemsize),
    ]


def _head(setup: Setup) -> list[Part]:
    """The output layer that scores: whole on every rank, ranks share positions."""
    return [
        Part("output layer", setup.size.table * setup.itemsize),
        Part("logits of some positions", 6 * ROWS * min(COLUMNS, setup.size.vocabulary) * _FP32),
    ]


def _with_candidate_units(setup: Setup, points: int, computing: list[Part]) -> list[Part]:
    """``computing``; or, where candidates are calibrated (``grouping/provider.py``), their units as this rank's shards,
    the hidden states that they are made from, and making one or ``computing``, whichever takes more."""
    if not setup.options.grouped:
        return computing
    size = setup.size
    unit = setup.unit_blocks * size.block_on(setup.ranks) * _FP32
    samples = size.layers * setup.own_calibration_tokens * size.hidden * _FP32
    return [
        Part("hidden states to calibrate on", samples),
        Part("calibrated units", min(points * unit, max(CACHE_BYTES, unit))),
        *max(computing, _calibrating(setup), key=lambda parts: sum(p.bytes for p in parts)),
    ]


def _calibrating(setup: Setup) -> list[Part]:
    """A block in closed form, in float32, whole on every rank (``grouping/calibrate.py``)."""
    size, tokens = setup.size, setup.own_calibration_tokens
    names = setup.options.ingredient_names
    # Of three orders of heads the best so far and the one at hand.
    orders = 2 if "heads" in names and size.kv_groups != setup.branches else 1
    following = setup.options.sync_points != "attention"
    mlp = size.experts * size.mlp_matrices
    states = (2 + setup.branches) * orders + 2
    # First ways of reading are fitted, then each is tried: its neurons moved, its maps folded in.
    together = min(setup.streamed_together, tokens)
    activations = together * (4 * size.active * size.ffn + setup.branches * size.hidden)
    trial = Part("candidate", (mlp + size.experts * size.readers + activations) * _FP32)
    fits = bool({"norm", "refit"} & set(names))
    fit = Part("moments of inputs, float64", fits * _FIT_MATRICES * setup.branches * size.hidden**2 * _FP64)
    return [
        Part("blocks in float32", (orders + following) * size.block * _FP32),
        Part("hidden states, dense and by branch", states * tokens * size.hidden * _FP32),
        max(fit, trial, key=lambda part: part.bytes),
    ]


def _forward(setup: Setup, tokens: int) -> int:
    """Temporary tensors of one block for ``tokens``: the MLP's, which are the largest; and a few hidden states."""
    size, local = setup.size, setup.local_branches
    neurons = (5 if size.gated else 3) * size.active * size.ffn // setup.ranks
    return tokens * (neurons + (3 + 3 * local) * size.hidden) * setup.itemsize


def _saved(setup: Setup) -> int:
    """What one block keeps of a micro-batch for the backward pass."""
    size, tokens, ranks = setup.size, setup.micro_batch, setup.ranks
    heads = (2 * size.qkv_rows + 2 * size.heads * size.head_dim) // ranks
    neurons = (4 if size.gated else 2) * size.active * size.ffn // ranks
    linear = tokens * (heads + neurons + (6 + 3 * setup.local_branches) * size.hidden) * setup.itemsize
    # Megatron-core's attention in PyTorch keeps scores and probabilities [heads, s, s] of every sequence.
    return linear + 2 * tokens * setup.length * size.heads // ranks * setup.itemsize


def _backward(setup: Setup) -> int:
    """Gradients of activations on their way through a block, and the loss in float32."""
    size, tokens = setup.size, setup.micro_batch
    neurons = (4 if size.gated else 2) * size.active * size.ffn // setup.ranks
    scores = 2 * setup.length * size.heads // setup.ranks
    return tokens * (neurons + scores) * setup.itemsize + 4 * tokens * size.hidden * _FP32


def _optimizer(setup: Setup, trained: int, held: int, activations: int) -> list[Part]:
    """DeepSpeed's part for ``trained`` of the ``held`` parameters of a rank: AdamW's two moments in float32, float32
    weights under ZeRO, what its replicas share out, and gradients. These come as ``activations`` go; they are there
    together only where gradients are accumulated."""
    stage, shared = setup.training.zero_stage(), setup.replicas
    own = trained // shared
    gradients = trained * setup.itemsize
    if stage:
        gradients = (trained if stage == 1 else own) * setup.itemsize + own * _FP32
    if setup.training.batching()[1] > 1:
        coming = Part("activations of a micro-batch, gradients", activations + gradients)
    else:
        coming = Part("activations of a micro-batch, or gradients", max(activations, gradients))
    if stage == 0:
        return [coming, Part("optimizer", 2 * trained * _FP32)]
    parts = [
        coming,
        Part("optimizer, float32 weights", 3 * own * _FP32),
        Part("buffer of gradients", min(BUCKET, trained) * setup.itemsize),
    ]
    if stage == 3:
        # Counted whole above: only the blocks at work are.
        parts.append(Part("weights of other replicas", -(held - held // shared) * setup.itemsize))
    return parts
