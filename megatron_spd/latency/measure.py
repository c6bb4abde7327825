"""Time to first token and time between tokens of several models, interleaved in one run."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_spd.collective import low_bit_format
from megatron_spd.comm.lowbit import GATHER, PLAIN_BELOW
from megatron_spd.latency.bounds import LinkSpeed, bytes_sent
from megatron_spd.latency.breakdown import (
    Breakdown,
    RankTimes,
    TimedCall,
    break_down,
    median_breakdown,
    rank_times,
)
from megatron_spd.latency.clock import clock_for
from megatron_spd.latency.collectives import recorded, silenced
from megatron_spd.latency.model import CachedModel
from megatron_spd.plan import BlockSchedule, SPDPlan
from megatron_spd.runtime.distributed import Runtime

#: Numbers in the large all-reduce that shows a link's rate (4 MB in fp32), and how often it is timed.
_LARGE, _LARGE_TIMES = 1_000_000, 5
#: Small all-reduces timed together, and how often.
_SMALL_TOGETHER, _SMALL_TIMES = 10, 9


@dataclass(frozen=True)
class Workload:
    """``batch`` prompts of ``prompt`` tokens each, continued by ``new_tokens`` tokens (at least 2)."""

    batch: int
    prompt: int
    new_tokens: int


@dataclass(frozen=True)
class Runner:
    """What is timed: ``model`` built for ``plan``; ``silent``: with its collectives left out."""

    model: CachedModel
    plan: SPDPlan
    silent: bool = False

    def quiet(self) -> contextlib.AbstractContextManager[None]:
        """The context in which this runner's forward passes run."""
        return silenced() if self.silent else contextlib.nullcontext()


@dataclass(frozen=True)
class Traffic:
    """Collectives of one forward pass on one rank and the bytes that enter them, in the blocks; ``sent``: the bytes
    that a rank must send for them (see ``bounds.bytes_sent``). Those among all ranks, and for M > G, ``inside_``, those
    among the ranks of a branch."""

    calls: int
    num_bytes: int
    sent: float
    inside_calls: int = 0
    inside_bytes: int = 0
    inside_sent: float = 0.0


@dataclass(frozen=True)
class Phase:
    """One of the two figures of a runner. ``seconds``: a value for every round, the slowest rank's."""

    seconds: list[float]
    traffic: Traffic
    breakdown: Breakdown


@dataclass(frozen=True)
class Measured:
    """Time to first token, and time between tokens as a round's mean over its new tokens."""

    first_token: Phase
    next_token: Phase


def measure(
    runners: Mapping[str, Runner],
    work: Workload,
    runtime: Runtime,
    rounds: int,
    warm_up: int = 1,
    recorded_rounds: int = 3,
    seed: int = 0,
    after_run: Callable[[], object] = lambda: None,
) -> dict[str, Measured]:
    """Time every runner once in each of ``rounds`` rounds, the first in turn changing from round to round, after
    ``warm_up`` rounds that do not count.

    Calls, bytes and breakdown come from ``recorded_rounds`` further rounds, so that taking them costs the timed ones
    nothing. ``after_run`` is called after each run of a runner. Called on all ranks, with the same result on each.
    Raises RuntimeError if a runner's collectives are not those of its plan.
    """
    generator = torch.Generator().manual_seed(seed)
    vocabulary = min(runner.model.vocab_size for runner in runners.values())
    prompts = torch.randint(0, vocabulary, (work.batch, work.prompt), generator=generator).to(runtime.device)
    timed: dict[str, list[tuple[float, float]]] = {name: [] for name in runners}
    for number in range(warm_up + rounds):
        for name in _rotated(list(runners), number):
            times = _timed_run(runners[name], prompts, work.new_tokens, runtime)
            after_run()
            if number >= warm_up:
                timed[name].append(times)
    records: dict[str, list[tuple[RankTimes, RankTimes]]] = {name: [] for name in runners}
    for number in range(recorded_rounds):
        for name in _rotated(list(runners), number):
            records[name].append(_recorded_run(runners[name], prompts, runtime))
            after_run()
    for name, runner in runners.items():
        _check_traffic(name, runner, records[name][0], prompts)
    every = _from_all_ranks((timed, records), runtime)
    return {name: _combined(name, every) for name in runners}


def measure_link(
    runtime: Runtime, nominal: float | None = None, group: dist.ProcessGroup | None = None
) -> LinkSpeed:
    """The speed of all-reduces between the ranks, nothing else running: medians. ``nominal``: bytes per second that the
    link is set to. ``group``: default all tensor-parallel ranks. Called on all ranks, each with its group; the answer
    is rank 0's. Of one rank alone: no cost at all."""
    group = group or runtime.tp_group
    if group.size() == 1:
        return LinkSpeed(0.0, None, nominal)
    small = statistics.median(
        _all_reduce_seconds(1, _SMALL_TOGETHER, group, runtime) for _ in range(_SMALL_TIMES + 1)
    )
    large = statistics.median(_all_reduce_seconds(_LARGE, 1, group, runtime) for _ in range(_LARGE_TIMES))
    sent = bytes_sent("all_reduce", 4 * _LARGE, group.size())
    return runtime.from_main(LinkSpeed(small, sent / max(large - small, 1e-9), nominal))


def _all_reduce_seconds(numbers: int, together: int, group: dist.ProcessGroup, runtime: Runtime) -> float:
    """Seconds of one fp32 all-reduce of ``numbers`` over ``group`` among ``together`` in a row."""
    clock = clock_for(runtime.device)
    tensor = torch.zeros(numbers, device=runtime.device)
    runtime.barrier()
    clock.finish()
    start = time.perf_counter()
    for _ in range(together):
        dist.all_reduce(tensor, group=group)
    clock.finish()
    return (time.perf_counter() - start) / together


def _rotated(names: list[str], by: int) -> list[str]:
    by %= len(names)
    return names[by:] + names[:by]


def _timed_run(runner: Runner, prompts: Tensor, new_tokens: int, runtime: Runtime) -> tuple[float, float]:
    """Seconds to the first token, and for each further one. A token counts when the host has it."""
    clock = clock_for(runtime.device)
    runtime.barrier()
    with runner.quiet():
        start = time.perf_counter()
        tokens = runner.model.prefill(prompts)
        tokens.tolist()
        first = time.perf_counter()
        for _ in range(new_tokens - 1):
            tokens = runner.model.decode(tokens)
            tokens.tolist()
        end = time.perf_counter()
    clock.finish()
    return first - start, (end - first) / (new_tokens - 1)


def _recorded_run(runner: Runner, prompts: Tensor, runtime: Runtime) -> tuple[RankTimes, RankTimes]:
    """The recordings of the prompts' forward pass and of the next token's."""
    clock = clock_for(runtime.device)
    layers = list(runner.model.model.decoder.layers)
    runtime.barrier()
    with recorded(layers, clock) as first, runner.quiet():
        tokens = runner.model.prefill(prompts)
    clock.finish()
    runtime.barrier()
    with recorded(layers, clock) as following, runner.quiet():
        runner.model.decode(tokens)
    clock.finish()
    return rank_times(first, clock), rank_times(following, clock)


def _check_traffic(name: str, runner: Runner, record: tuple[RankTimes, RankTimes], prompts: Tensor) -> None:
    """Raise RuntimeError unless every block made the collectives that the plan says."""
    model = runner.model.model
    ranks = 1 if runner.silent else model.config.tensor_model_parallel_size
    norm = model.decoder.final_layernorm.weight
    for times, tokens in zip(record, (prompts.numel(), prompts.shape[0]), strict=True):
        for block in range(runner.plan.num_layers):
            schedule = runner.plan.block_schedule(block)
            expected = expected_calls(schedule, tokens * norm.numel(), norm.element_size(), ranks)
            made = [(call.name, call.num_bytes, call.ranks) for call in times.calls if call.block == block]
            if made != expected:
                raise RuntimeError(
                    f"{name}, block {block}: the plan asks for {expected}, but {made} took place"
                )


def expected_calls(
    schedule: BlockSchedule, numel: int, itemsize: int, ranks: int
) -> list[tuple[str, int, int]]:
    """The collectives of a block's forward pass on one of ``ranks`` ranks, in order, with the bytes that the rank gives
    in and the number of ranks that take part. ``numel``: values of the hidden states, of ``itemsize`` bytes each."""
    if ranks == 1:
        return []
    calls: list[tuple[str, int, int]] = []
    for sublayer in ("attention", "mlp"):
        if getattr(schedule, f"drop_{sublayer}"):
            if ranks > schedule.branches:
                calls.append(("all_reduce", numel * itemsize, ranks // schedule.branches))
            continue
        low_bit = low_bit_format(getattr(schedule, f"{sublayer}_collective"))
        if low_bit is None or numel * itemsize < PLAIN_BELOW:
            calls.append(("all_reduce", numel * itemsize, ranks))
        else:
            chunk = low_bit.chunk(numel, ranks)
            calls.append(("all_to_all_single", ranks * low_bit.scatter.wire_bytes(chunk), ranks))
            calls.append((GATHER, low_bit.gather.wire_bytes(chunk), ranks))
    return calls


def _from_all_ranks(value: Any, runtime: Runtime) -> list[Any]:
    """Every rank's ``value`` in rank order."""
    if runtime.tp_size == 1:
        return [value]
    box: list[Any] = [None] * runtime.tp_size
    dist.all_gather_object(box, value, group=runtime.tp_group)
    return box


def _combined(name: str, every: Sequence[tuple[Any, Any]]) -> Measured:
    """One runner's figures from what every rank has timed and recorded."""
    phases = []
    for phase in (0, 1):
        seconds = [
            max(times[phase] for times in together)
            for together in zip(*(t[name] for t, _ in every), strict=True)
        ]
        records = [[r[phase] for r in recs[name]] for _, recs in every]
        passes = [break_down(together) for together in zip(*records, strict=True)]
        phases.append(Phase(seconds, _traffic(records[0][0], len(every)), median_breakdown(passes)))
    return Measured(*phases)


def _traffic(times: RankTimes, ranks: int) -> Traffic:
    of_blocks = [call for call in times.calls if call.block is not None]
    across = [call for call in of_blocks if call.ranks == ranks]
    inside = [call for call in of_blocks if call.ranks != ranks]
    return Traffic(*_sums(across), *_sums(inside))


def _sums(calls: Sequence[TimedCall]) -> tuple[int, int, float]:
    """Their number, the bytes that enter them, and those that a rank must send for them."""
    sent = sum(bytes_sent(call.name, call.num_bytes, call.ranks) for call in calls)
    return len(calls), sum(call.num_bytes for call in calls), sent
