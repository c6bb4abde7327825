"""All-reduces in full against low-bit ones, for several sizes of a message."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_spd.collective import FULL, CollectiveFormat
from megatron_spd.comm.all_reduce import all_reduce
from megatron_spd.comm.lowbit import exchanged_bytes, lowbit_all_reduce
from megatron_spd.config import CollectivesOptions
from megatron_spd.errors import UserError
from megatron_spd.latency.bounds import Spread, bytes_sent
from megatron_spd.latency.clock import clock_for
from megatron_spd.latency.link import enter_network, set_rate
from megatron_spd.models.build import DTYPES
from megatron_spd.progress import progress_bar
from megatron_spd.runtime.cpu import keep_freed_memory
from megatron_spd.runtime.distributed import Runtime, initialize, shutdown

#: Runs of each collective before those that count.
_WARM_UP = 2


def run_messages(options: CollectivesOptions) -> tuple[dict[str, Any], bool]:
    """Time what ``options`` ask for between the launched ranks: the result (:func:`measure_messages`), and whether this
    rank is the main one.

    Raises UserError where links cannot be shaped, and for one rank.
    """
    if options.ranks == 1:
        raise UserError("collectives need ranks to run between: give --ranks 2 or more")
    if options.rate_values:
        enter_network(int(os.environ["RANK"]), options.ranks)
    runtime = initialize()
    keep_freed_memory()
    result = measure_messages(options, runtime)
    shutdown()
    return result, runtime.is_main


def measure_messages(options: CollectivesOptions, runtime: Runtime) -> dict[str, Any]:
    """``ranks``, ``backend``, ``dtype``, ``repeats`` and ``rows``: for each link rate (``gigabits``), size (``bytes``)
    and ``collective`` the median of ``seconds``, the ``ratio`` of the full all-reduce to it (median, ``ratio_low``,
    ``ratio_high``), the bytes that a rank sends (``sent``), what these need at the link's rate (``least_seconds``), and
    the ``error`` relative to the largest sum. Called on all ranks; with rates, those must be in their networks.
    """
    rates: list[float | None] = [*options.rate_values] or [None]
    dtype, formats = DTYPES[options.dtype], options.format_names
    rows: list[dict[str, Any]] = []
    total = len(rates) * len(options.message_sizes)
    with progress_bar(runtime, "collectives", total, "size") as bar:
        for rate in rates:
            if rate is not None:
                set_rate(rate)
            runtime.barrier()
            for size in options.message_sizes:
                timed = _rows(size, formats, dtype, options.repeats, rate, runtime)
                rows += [{"gigabits": rate, **row} for row in timed]
                bar.update()
    facts = {"ranks": runtime.tp_size, "backend": str(dist.get_backend(runtime.tp_group))}
    return facts | {"dtype": options.dtype, "repeats": options.repeats, "rows": rows}


def _rows(
    size: int,
    formats: Sequence[str],
    dtype: torch.dtype,
    repeats: int,
    rate: float | None,
    runtime: Runtime,
) -> list[dict[str, Any]]:
    """All collectives on one tensor, one after the other in every repeat; a ratio is that of one repeat."""
    generator = torch.Generator().manual_seed(runtime.tp_rank)
    tensor = torch.randn(max(1, size // dtype.itemsize), generator=generator).to(runtime.device, dtype)
    names = [FULL, *formats]
    calls = {name: _call(name, tensor, runtime) for name in names}
    exact = all_reduce(tensor.double(), runtime.tp_group)
    errors = {n: float((c().double() - exact).abs().max() / exact.abs().max()) for n, c in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(-_WARM_UP, repeats):
        for name in names if repeat % 2 == 0 else names[::-1]:
            took = _slowest(calls[name], runtime)
            if repeat >= 0:
                seconds[name].append(took)
    rows = []
    for name in names:
        ratio = Spread.of(a / b for a, b in zip(seconds[FULL], seconds[name], strict=True))
        sent = bytes_sent("all_reduce", tensor.nbytes, runtime.tp_size)
        if name != FULL:
            sent = exchanged_bytes(tensor.numel(), runtime.tp_size, CollectiveFormat.parse(name))
        times = {"seconds": statistics.median(seconds[name]), "ratio": ratio.median}
        times |= {"ratio_low": ratio.low, "ratio_high": ratio.high}
        least = None if rate is None else 8 * sent / (rate * 1e9)
        facts = {"bytes": size, "collective": name, "sent": sent, "least_seconds": least}
        rows.append(facts | times | {"error": errors[name]})
    return rows


def _call(name: str, tensor: Tensor, runtime: Runtime) -> Callable[[], Tensor]:
    """A call of the collective ``name`` on ``tensor`` that leaves it as it is."""
    if name == FULL:
        return lambda: all_reduce(tensor.clone(), runtime.tp_group)
    fmt = CollectiveFormat.parse(name)
    return lambda: lowbit_all_reduce(tensor, fmt, runtime.tp_group, plain_below=0)


def _slowest(call: Callable[[], Tensor], runtime: Runtime) -> float:
    """Seconds that the slowest rank takes, from a barrier on."""
    clock = clock_for(runtime.device)
    runtime.barrier()
    clock.finish()
    started = time.perf_counter()
    call()
    clock.finish()
    seconds = torch.tensor(time.perf_counter() - started, dtype=torch.float64, device=runtime.device)
    dist.all_reduce(seconds, dist.ReduceOp.MAX, group=runtime.tp_group)
    return float(seconds)
