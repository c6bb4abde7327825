"""What the benchmarks share: their options, interleaved timing of two sides, and the printing of ratios.

The two sides run in turn in one process, and each repeat gives one ratio, so that a machine that is slower for
a while is slower for both. The figure is the median of the ratios; their quartiles say how far to trust it. On
a machine whose cores are shared, threads that wait for one another distort both sides: there,
``--threads 1 --clock cpu`` counts what the process itself computes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_spd.calibration.text import read_text, token_batches
from megatron_spd.checkpoint.hf import CheckpointReader
from megatron_spd.errors import UserError
from megatron_spd.runtime.distributed import initialize, shutdown

Side = Callable[[], Any]

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Seconds of both sides in every repeat, for the same work.

    ``target``: the largest ratio that is good enough, if there is one.
    """

    name: str
    seconds: list[float]
    reference_seconds: list[float]
    target: float | None = None

    @property
    def ratios(self) -> list[float]:
        """Our time over the reference's, repeat by repeat, in ascending order."""
        return sorted(a / b for a, b in zip(self.seconds, self.reference_seconds, strict=True))

    def summary(self) -> dict[str, Any]:
        """As it goes into the JSON object: medians, and the quartiles of the ratio."""
        ratios = self.ratios * 2 if len(self.ratios) == 1 else self.ratios
        low, middle, high = statistics.quantiles(ratios, method="inclusive")
        return {
            "name": self.name,
            "ratio": middle,
            "ratio_low": low,
            "ratio_high": high,
            "seconds": statistics.median(self.seconds),
            "reference_seconds": statistics.median(self.reference_seconds),
            "repeats": len(self.ratios),
            "target": self.target,
        }


def interleave(
    name: str, ours: Side, reference: Side, args: argparse.Namespace, target: float | None = None
) -> Comparison:
    """Time both sides in turn, as often and by the clock that ``args`` say; both should have run once before.

    Every other repeat starts with the reference.
    """
    seconds: dict[Side, list[float]] = {ours: [], reference: []}
    for repeat in range(args.repeats):
        for side in (ours, reference) if repeat % 2 == 0 else (reference, ours):
            seconds[side].append(clocked(side, args.clock)[0])
    return Comparison(name, seconds[ours], seconds[reference], target)


def clocked(side: Side, clock: str) -> tuple[float, Any]:
    """Seconds that a call of ``side`` takes by one of :data:`CLOCKS`, and its result."""
    now = CLOCKS[clock]
    _finish_device_work()
    started = now()
    result = side()
    _finish_device_work()
    return now() - started, result


def _finish_device_work() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def options(description: str, sequences: int, seq_length: int, repeats: int) -> argparse.ArgumentParser:
    """The options of every benchmark, with a benchmark's own defaults."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder of a plain Hugging Face checkpoint")
    parser.add_argument("--data", help="UTF-8 text file; without it, the embedded text")
    parser.add_argument("--sequences", type=int, default=sequences, help="token sequences that are computed")
    parser.add_argument("--seq-length", type=int, default=seq_length, help="tokens in each")
    parser.add_argument("--repeats", type=int, default=repeats, help="times that both sides are measured")
    parser.add_argument("--threads", type=int, help="compute threads; PyTorch's own number if not given")
    clock_help = "time passed, or time that this process computed"
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall", help=clock_help)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    return parser


def tokens_of(reader: CheckpointReader, args: argparse.Namespace) -> Tensor:
    """The token pieces [sequences, seq_length] that the options ask for."""
    return token_batches(reader.tokenizer(), read_text(args.data), args.sequences, args.seq_length)


def run(
    benchmark: str,
    parser: argparse.ArgumentParser,
    measure: Callable[..., tuple[list[Comparison], dict[str, Any]]],
) -> int:
    """Parse the options, call ``measure(args, reader, runtime)`` and print what it found; returns the exit code.

    ``measure`` returns its comparisons, the most important first, and further facts for the JSON object.
    """
    args = parser.parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    try:
        comparisons, facts = measure(args, CheckpointReader(args.model), initialize(1))
    except UserError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    shutdown()
    summaries = [c.summary() for c in comparisons]
    threads = torch.get_num_threads()
    print(f"{benchmark}: {args.sequences} x {args.seq_length} tokens, {threads} threads, {args.clock} clock")
    for s in summaries:
        print(_line(s))
    if args.json:
        given = {name: getattr(args, name) for name in ("model", "sequences", "seq_length", "clock")}
        given["threads"] = threads
        head = {"benchmark": benchmark, "ratio": summaries[0]["ratio"], "target": summaries[0]["target"]}
        print(
            json.dumps(head | given | facts | {"threads": torch.get_num_threads(), "comparisons": summaries})
        )
    return 0


def _line(s: dict[str, Any]) -> str:
    spread = f"quartiles {s['ratio_low']:.3f} to {s['ratio_high']:.3f}, {s['repeats']} repeats"
    seconds = f"{s['seconds']:.4g} s against {s['reference_seconds']:.4g} s"
    text = f"  {s['name']}: ratio {s['ratio']:.3f} ({spread}), {seconds}"
    if s["target"] is None:
        return text
    return f"{text}; target at most {s['target']}: {'met' if s['ratio'] <= s['target'] else 'missed'}"
