"""The whole benchmark: every variant, workload and link speed, as one JSON-able result."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_spd.checkpoint.hf import CheckpointReader
from megatron_spd.latency.bounds import LinkSpeed, Spread, saving
from megatron_spd.latency.breakdown import as_json
from megatron_spd.latency.link import set_rate
from megatron_spd.latency.measure import Measured, Phase, Runner, Workload, measure, measure_link
from megatron_spd.latency.model import CachedModel, load_model, share_weights
from megatron_spd.latency.variants import PLAIN, Variant
from megatron_spd.progress import progress_bar
from megatron_spd.runtime.branch_groups import branch_process_group
from megatron_spd.runtime.distributed import Runtime


@dataclass(frozen=True)
class Settings:
    """What is timed, and how often (see ``measure.measure``). ``rates``: of the links in Gbit/s; none: the ranks talk
    over whatever connects them. ``ranks_per_node``: ranks behind one link."""

    works: Sequence[Workload]
    rates: Sequence[float]
    rounds: int
    dtype: torch.dtype
    seed: int = 0
    warm_up: int = 1
    recorded_rounds: int = 3
    ranks_per_node: int = 1


def run_benchmark(
    reader: CheckpointReader, variants: Sequence[Variant], settings: Settings, runtime: Runtime
) -> dict[str, Any]:
    """Time ``variants`` of the model in ``reader`` (:data:`PLAIN` first) at every workload and link rate.

    With rates the ranks must be in their networks (``link.enter_network``). Called on all ranks, with the same result
    on each; ``report/latency.py`` says what it holds.
    """
    runners = _runners(reader, variants, settings, runtime)
    rates: list[float | None] = [*settings.rates] or [None]
    links = []
    together = settings.warm_up + settings.rounds + settings.recorded_rounds
    runs = len(rates) * len(settings.works) * together * len(runners)
    with progress_bar(runtime, "latency", runs, "run") as bar:
        for rate in rates:
            if rate is not None:
                set_rate(rate, settings.ranks_per_node)
            runtime.barrier()
            speed = measure_link(runtime, None if rate is None else rate * 1e9 / 8)
            inside = {
                branches: measure_link(runtime, group=branch_process_group(branches, runtime.tp_group))
                for branches in _shared_branches(variants, runtime.tp_size)
            }
            cases = []
            for work in settings.works:
                measured = measure(
                    runners,
                    work,
                    runtime,
                    settings.rounds,
                    settings.warm_up,
                    settings.recorded_rounds,
                    settings.seed,
                    bar.update,
                )
                branches = {v.name: v.plan.branches for v in variants}
                compared = _compared(measured, speed, {n: inside.get(g) for n, g in branches.items()})
                cases.append({**asdict(work), "variants": compared})
            within = {str(branches): asdict(one) for branches, one in inside.items()}
            links.append({"gigabits": rate, **asdict(speed), "inside": within, "cases": cases})
    return _facts(variants, settings, runtime) | {"links": links}


def _shared_branches(variants: Sequence[Variant], ranks: int) -> list[int]:
    """Every G for which a dropped point has an all-reduce among some of the ranks."""
    return sorted({v.plan.branches for v in variants if 1 < v.plan.branches < ranks and v.plan.dropped})


def _facts(variants: Sequence[Variant], settings: Settings, runtime: Runtime) -> dict[str, Any]:
    """What stands above the figures."""
    return {
        "ranks": runtime.tp_size,
        "ranks_per_node": settings.ranks_per_node if settings.rates else None,
        "backend": str(dist.get_backend(runtime.tp_group)),
        "device": str(runtime.device.type),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "dtype": str(settings.dtype).removeprefix("torch."),
        "rounds": settings.rounds,
        "variants": {
            v.name: {"branches": v.plan.branches, "sync_points": v.plan.sync_points, "silent": v.silent}
            for v in variants
        },
    }


def _runners(
    reader: CheckpointReader, variants: Sequence[Variant], settings: Settings, runtime: Runtime
) -> dict[str, Runner]:
    """Every variant's model; all refer to one set of weights."""
    batch = max(work.batch for work in settings.works)
    length = max(work.prompt + work.new_tokens for work in settings.works)
    runners: dict[str, Runner] = {}
    for variant in variants:
        model = load_model(reader, variant.plan, runtime, settings.dtype)
        if runners:
            share_weights(model, runners[PLAIN].model.model)
        cached = CachedModel(model, int(reader.config["vocab_size"]), batch, length)
        runners[variant.name] = Runner(cached, variant.plan, variant.silent)
    return runners


def _compared(
    measured: dict[str, Measured], speed: LinkSpeed, inside: Mapping[str, LinkSpeed | None]
) -> dict[str, Any]:
    """By variant and phase: time, traffic, breakdown and the saving over plain. ``inside``: the speed inside the branch
    groups of a variant, where it uses any."""
    plain = measured[PLAIN]
    return {
        name: {
            "first_token": _phase(m.first_token, plain.first_token, speed, inside[name]),
            "next_token": _phase(m.next_token, plain.next_token, speed, inside[name]),
        }
        for name, m in measured.items()
    }


def _phase(phase: Phase, plain: Phase, speed: LinkSpeed, inside: LinkSpeed | None) -> dict[str, Any]:
    ours, theirs = phase.traffic, plain.traffic
    spent = 0.0 if inside is None else inside.seconds(ours.inside_calls, ours.inside_sent)
    fewer, less = theirs.calls - ours.calls, theirs.sent - ours.sent
    saved = saving(plain.seconds, phase.seconds, fewer, less, speed, spent)
    return {
        "seconds": asdict(Spread.of(phase.seconds)),
        **asdict(ours),
        "saving": {**asdict(saved), "of_predicted": saved.of_predicted},
        "breakdown": as_json(phase.breakdown),
    }
