"""What each stage computes, reads and sends, and the time that this takes under stated assumptions.

Operations and bytes follow from the stages' code; times are estimates: operations over a share of the data sheet's
rate, bytes over rates of disk and links, added up without any overlap. Not counted: assigning neurons to branches and
writing files (processor of the main rank), starting processes, generation of samples.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_spd.distill.loop import EVALUATIONS
from megatron_spd.grouping.calibrate import NEURON_TOKENS
from megatron_spd.grouping.provider import CACHE_BYTES
from megatron_spd.grouping.walk import HELD_OUT
from megatron_spd.scale.setup import Setup

#: Forward and backward of a trained block, in forwards; recomputing adds one.
_TRAINED = 3
#: Ways of reading that a calibrated sublayer tries: as it is, shifted, re-fitted, with neurons moved.
_TRIALS = 4
#: Operations of a re-fit, in h^3: a solve with h right sides and one with a single right side.
_SOLVES = 2 / 3 + 2 + 2 / 3


@dataclass(frozen=True)
class Work:
    """Of one rank in one stage. ``tokens``: of text that passes through blocks or units, counted once; ``flops``: in
    --dtype, beside those in float32 and float64; ``sent``: bytes that all-reduces among M ranks take, before the factor
    of their algorithm, ``replica_sent`` those among replicas; ``read``, ``written``: bytes of weights on disk."""

    tokens: int
    flops: float = 0.0
    fp32_flops: float = 0.0
    fp64_flops: float = 0.0
    sent: float = 0.0
    replica_sent: float = 0.0
    read: int = 0
    written: int = 0


def stage_work(setup: Setup) -> dict[str, Work]:
    """The work of every stage of ``run``, by the names of ``memory.stage_memory``."""
    known = (sensitivity, search, calibration, distillation, finishing, export)
    return {stage.__name__: stage(setup) for stage in known if stage.__name__ in setup.stages}


def sensitivity(setup: Setup) -> Work:
    """One pass over the blocks; each candidate's stream goes through those behind its point."""
    size, tokens = setup.size, setup.measured_tokens
    starts = setup.candidate_starts()
    passes = size.layers + sum(size.layers - start for start in starts)
    scored = (len(starts) + 1) * (2 if setup.options.grouped or setup.options.formats else 1)
    units = _units(setup, setup.droppable) if setup.options.grouped else _Units()
    return Work(
        tokens,
        flops=(passes * _block(setup) + scored * size.head_flops) * tokens / setup.ranks,
        fp32_flops=units.fp32_flops,
        fp64_flops=units.fp64_flops,
        sent=2 * passes * _states(setup, tokens),
        read=_model(setup) + units.read,
    )


def search(setup: Setup) -> Work:
    """Every set from block 0; calibrated units that the cache has lost are made again for half of the sets' drops."""
    size, tokens, sets = setup.size, setup.measured_tokens, setup.options.sets_to_measure
    unit = setup.unit_blocks * size.block_on(setup.ranks) * 4
    again = setup.units * sets // 2 if setup.units * unit > CACHE_BYTES else 0
    units = _units(setup, again) if setup.options.grouped else _Units()
    return Work(
        tokens,
        flops=sets * (size.layers * _block(setup) + 2 * size.head_flops) * tokens / setup.ranks,
        fp32_flops=units.fp32_flops,
        fp64_flops=units.fp64_flops,
        sent=2 * sets * size.layers * _states(setup, tokens),
        read=sets * _blocks(setup, size.layers) + units.read,
    )


def calibration(setup: Setup) -> Work:
    """The plain model's states go through all blocks; every unit with a drop is calibrated."""
    size, tokens = setup.size, setup.calibration_tokens
    units = _units(setup, setup.units)
    return Work(
        tokens,
        flops=size.layers * _block(setup) * tokens / setup.ranks,
        fp32_flops=units.fp32_flops,
        fp64_flops=units.fp64_flops,
        sent=2 * size.layers * _states(setup, tokens),
        read=_blocks(setup, size.layers) + units.read,
        written=_blocks(setup, setup.units * setup.unit_blocks),
    )


def distillation(setup: Setup) -> Work:
    """Every unit with a drop is trained (an upper bound: insensitive ones are not)."""
    size, text = setup.size, setup.distill_tokens
    walks = 1 if setup.options.inputs == "teacher" else 2
    pieces = text // setup.length
    judges = setup.training.held_out_count(pieces)
    trained = setup.training.examples(pieces - judges, setup.length) * setup.length
    blocks = setup.units * setup.unit_blocks
    passes = _TRAINED * trained / setup.replicas + (EVALUATIONS + 1) * judges * setup.length
    parameters = blocks * size.block_on(setup.ranks) * setup.itemsize
    steps = trained // (setup.micro_batch * setup.training.batching()[1] * setup.replicas)
    return Work(
        trained,
        flops=(walks * size.layers * text + blocks * passes) * _block(setup) / setup.ranks,
        sent=2 * (walks * size.layers * _states(setup, text) + blocks * _states(setup, round(passes))),
        replica_sent=parameters * steps if setup.replicas > 1 else 0.0,
        read=walks * _blocks(setup, size.layers) + _blocks(setup, blocks),
        written=_blocks(setup, blocks),
    )


def finishing(setup: Setup) -> Work:
    """The plain model's answers, streamed, and the whole student trained on them."""
    size, settings = setup.size, setup.finishing
    assert settings is not None
    pieces = setup.finish_tokens // setup.length
    judges = settings.held_out_count(pieces)
    trained = settings.examples(pieces - judges, setup.length) * setup.length
    forwards = _TRAINED + setup.options.finish_recompute
    own = trained / setup.replicas
    evaluated = (EVALUATIONS + 1) * judges * setup.length / setup.replicas
    answered = own + judges * setup.length / setup.replicas
    blocks = (forwards * own + evaluated + answered) * size.layers * _block(setup)
    # Logits of both models, and their gradient's way back.
    heads = (3 * own + 2 * evaluated) * size.head_flops
    steps = trained // (setup.micro_batch * settings.batching()[1] * setup.replicas)
    parameters = size.layers * size.block_on(setup.ranks) * setup.itemsize
    return Work(
        trained,
        flops=(blocks + heads) / setup.ranks,
        sent=2 * size.layers * _states(setup, round(2 * own + evaluated + answered)),
        replica_sent=parameters * steps if setup.replicas > 1 else 0.0,
        read=2 * _model(setup),
        written=_blocks(setup, size.layers),
    )


def export(setup: Setup) -> Work:
    """Blocks are read, put in order, and written, by the main rank."""
    return Work(0, read=_model(setup), written=_model(setup))


def seconds(setup: Setup, work: Work) -> dict[str, float]:
    """Estimated seconds of ``work``: ``compute``, ``communication``, ``disk``, and their sum, ``total``."""
    options, peak = setup.options, setup.hardware.tflops
    rate = options.peak_tflops or peak[options.dtype]
    compute = work.flops / rate + work.fp32_flops / peak["fp32"] + work.fp64_flops / peak["fp64"]
    times = {
        "compute": compute / (options.efficiency * 1e12),
        "communication": (_ring(work.sent, setup.ranks) / setup.tensor_parallel_rate)
        + _ring(work.replica_sent, setup.replicas) / setup.data_parallel_rate,
        # The ranks of a node read the same blocks at the same time: the disk gives them once.
        "disk": (work.read + work.written) / (options.disk_rate * 1e9),
    }
    return times | {"total": sum(times.values())}


# ---- what stages share ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Units:
    """Calibrating some units, on one rank."""

    fp32_flops: float = 0.0
    fp64_flops: float = 0.0
    read: int = 0


def _units(setup: Setup, count: int) -> _Units:
    """``count`` units of calibration: two walks through a block for each (dense and under the rule), every trial on
    what judges, neurons' costs, moments, and folding (``grouping/calibrate.py``)."""
    size, tokens, branches = setup.size, setup.own_calibration_tokens, setup.branches
    blocks = setup.unit_blocks
    mlp = 2.0 * size.active * size.mlp_matrices
    walk = blocks * (2 + _TRIALS * HELD_OUT) * _block(setup) * tokens
    neurons = blocks * (branches + 1) * mlp * min(tokens, NEURON_TOKENS // setup.world)
    refit = "refit" in setup.options.ingredient_names
    moments = refit * 4.0 * branches * tokens * size.hidden**2
    folds = refit * 3 * 2.0 * size.experts * size.readers * size.hidden
    return _Units(
        count * (walk + neurons + moments + folds),
        count * refit * _SOLVES * branches * float(size.hidden) ** 3,
        _blocks(setup, count * (1 if blocks == 1 else 3)),
    )


def _block(setup: Setup) -> float:
    return setup.size.forward_flops(setup.length)


def _blocks(setup: Setup, count: int) -> int:
    return count * setup.size.block * setup.size.stored_bytes


def _model(setup: Setup) -> int:
    return setup.size.parameters * setup.size.stored_bytes


def _states(setup: Setup, tokens: int) -> int:
    return tokens * setup.size.hidden * setup.itemsize


def _ring(sent: float, ranks: int) -> float:
    """Bytes that each of ``ranks`` sends for all-reduces of ``sent`` bytes."""
    return 2 * sent * (ranks - 1) / ranks
