"""``megatron-spd plan --dry-run``: what ``run`` would take, as one JSON-able result."""

from __future__ import annotations

from typing import Any

from megatron_spd.config import DryRunOptions
from megatron_spd.models.registry import FAMILIES
from megatron_spd.scale.memory import Part, stage_memory
from megatron_spd.scale.setup import Setup
from megatron_spd.scale.work import Work, seconds, stage_work


def dry_run(options: DryRunOptions) -> dict[str, Any]:
    """The model, the setup, the assumptions, and for every stage its memory on a rank, work and estimated time.

    Raises UserError for a model or a split that ``run`` would refuse as well.
    """
    setup = Setup.of(options)
    memory, work = stage_memory(setup), stage_work(setup)
    stages = [_stage(setup, name, memory[name], work[name]) for name in memory]
    size = setup.size
    return {
        "model": {
            "name": size.name,
            "model_type": size.model_type,
            "parameters": size.parameters,
            "bytes": size.parameters * size.stored_bytes,
            "supported": size.model_type in {family.model_type for family in FAMILIES},
        },
        "setup": {
            "branches": setup.branches,
            "ranks": setup.ranks,
            "replicas": setup.replicas,
            "nodes": options.nodes,
            "dtype": options.dtype,
            "dropped": setup.dropped,
            "units": setup.units,
            "recovery": options.recovery,
        },
        "assumptions": {
            "hardware": options.hardware,
            "tflops": options.peak_tflops or setup.hardware.tflops[options.dtype],
            "efficiency": options.efficiency,
            "disk_rate": options.disk_rate * 1e9,
            "tensor_parallel_rate": setup.tensor_parallel_rate,
            "data_parallel_rate": setup.data_parallel_rate,
            "device_memory": setup.hardware.memory,
        },
        "stages": stages,
        "peak": {place: max(s["memory"][place] for s in stages) for place in ("device", "host")},
        "fits": _fits(setup, stages),
        "seconds": sum(s["seconds"]["total"] for s in stages),
    }


def _stage(setup: Setup, name: str, parts: list[Part], work: Work) -> dict[str, Any]:
    one_memory = setup.hardware.is_cpu
    sums = {"device": 0, "host": 0}
    for part in parts:
        sums["host" if one_memory else part.place] += part.bytes
    return {
        "stage": name,
        "memory": sums | {"parts": {part.name: part.bytes for part in parts}},
        "tokens": work.tokens,
        "flops": work.flops + work.fp32_flops + work.fp64_flops,
        "bytes_sent": work.sent + work.replica_sent,
        "bytes_read": work.read,
        "bytes_written": work.written,
        "seconds": seconds(setup, work),
    }


def _fits(setup: Setup, stages: list[dict[str, Any]]) -> dict[str, bool] | None:
    """Whether every stage fits a device; None where the machine's memory is not known."""
    limit = setup.hardware.memory
    return None if limit is None else {s["stage"]: s["memory"]["device"] <= limit for s in stages}
