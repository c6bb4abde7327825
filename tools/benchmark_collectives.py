"""All-reduce in full against low-bit ones, for several sizes of a message, in the process group of the launch.

usage: torchrun --nproc-per-node 3 tools/benchmark_collectives.py [--sizes 16k,4M] [--formats int8,int4] [--json FILE]

Runs under any launcher that sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, over gloo or NCCL. In every repeat all
collectives run one after the other on the same tensor; a time is that of the slowest rank, a ratio that of one repeat.
The least size whose ratio is above 1 is the threshold below which this link is better off with plain all-reduces.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_spd.collective import FULL, CollectiveFormat
from megatron_spd.comm.all_reduce import all_reduce
from megatron_spd.comm.lowbit import exchanged_bytes, lowbit_all_reduce
from megatron_spd.files import write_text_atomic
from megatron_spd.report.tables import size as in_words
from megatron_spd.report.tables import text_table

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def number_of_bytes(text: str) -> int:
    """``16k`` or ``4M`` (1024-based) as a number."""
    factor = {"k": 1024, "M": 1024**2}.get(text[-1:], 1)
    return int(text[:-1] if factor > 1 else text) * factor


def collective(name: str, tensor: Tensor) -> Callable[[], Tensor]:
    """A call of the collective ``name`` on ``tensor`` that leaves it as it is."""
    group = dist.group.WORLD
    assert group is not None
    if name == FULL:
        return lambda: all_reduce(tensor.clone(), group)
    fmt = CollectiveFormat.parse(name)
    return lambda: lowbit_all_reduce(tensor, fmt, group, plain_below=0)


def clocked(call: Callable[[], Tensor], device: torch.device) -> float:
    """Seconds that the slowest rank takes, from a barrier on."""
    dist.barrier()
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = torch.tensor(time.perf_counter() - started, dtype=torch.float64, device=device)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return float(seconds)


def measure(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """A row for each size and collective: medians of seconds and of ratios (full over this), their quartiles, bytes
    that a rank sends, and the error relative to the largest sum."""
    dtype, ranks = DTYPES[args.dtype], dist.get_world_size()
    names = [FULL, *args.formats.split(",")]
    rows = []
    for size in map(number_of_bytes, args.sizes.split(",")):
        generator = torch.Generator().manual_seed(dist.get_rank())
        tensor = torch.randn(max(1, size // dtype.itemsize), generator=generator).to(device, dtype)
        calls = {name: collective(name, tensor) for name in names}
        exact = all_reduce(tensor.double(), dist.group.WORLD)
        errors = {n: float((c().double() - exact).abs().max() / exact.abs().max()) for n, c in calls.items()}
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for repeat in range(args.repeats):
            for name in names if repeat % 2 == 0 else names[::-1]:
                seconds[name].append(clocked(calls[name], device))
        for name in names:
            ratios = [a / b for a, b in zip(seconds[FULL], seconds[name], strict=True)]
            low, middle, high = statistics.quantiles(ratios, method="inclusive")
            sent = 2 * (ranks - 1) * tensor.numel() * dtype.itemsize // ranks
            if name != FULL:
                sent = exchanged_bytes(tensor.numel(), ranks, CollectiveFormat.parse(name))
            rows.append(
                {"bytes": size, "collective": name, "seconds": statistics.median(seconds[name])}
                | {"ratio": middle, "ratio_low": low, "ratio_high": high, "sent": sent, "error": errors[name]}
            )
    return rows


def main() -> None:
    """Print the table on rank 0, and write the JSON file where one is given."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--sizes", default="2k,16k,64k,256k,1M,4M", help="bytes of a message, commas between")
    parser.add_argument("--formats", default="int8,int4,int4:g64,int4/int8", help="low-bit formats")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp32")
    parser.add_argument("--repeats", type=int, default=15, help="at least 2")
    parser.add_argument("--backend", default="nccl" if torch.cuda.is_available() else "gloo")
    parser.add_argument("--threads", type=int, default=1, help="compute threads of a rank")
    parser.add_argument(
        "--timeout", type=float, default=120, help="seconds after which a collective gives up"
    )
    parser.add_argument("--json", type=Path, help="file to write")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dist.init_process_group(args.backend, timeout=timedelta(seconds=args.timeout))
    device = torch.device("cpu")
    if args.backend == "nccl":
        device = torch.device("cuda", dist.get_rank() % torch.cuda.device_count())
        torch.cuda.set_device(device)
    rows = measure(args, device)
    if dist.get_rank() == 0:
        cells = [
            (
                in_words(r["bytes"]),
                r["collective"],
                f"{1e3 * r['seconds']:.3f} ms",
                in_words(r["sent"]),
                f"{r['ratio']:.2f} ({r['ratio_low']:.2f} to {r['ratio_high']:.2f})",
                f"{r['error']:.1e}",
            )
            for r in rows
        ]
        print(f"{dist.get_world_size()} ranks, {args.backend}, {args.dtype}, {args.repeats} repeats")
        print(
            text_table(
                ("message", "collective", "median", "sent by a rank", "full over this", "error"), cells
            )
        )
        if args.json is not None:
            facts = {"ranks": dist.get_world_size(), "backend": args.backend, "dtype": args.dtype}
            write_text_atomic(args.json, json.dumps(facts | {"repeats": args.repeats, "rows": rows}) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
