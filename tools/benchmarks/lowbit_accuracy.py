"""Perplexity of the plain model with low-bit all-reduces at all sync points, or after attentions or MLPs alone.

usage: python tools/benchmarks/lowbit_accuracy.py --model DIR --data FILE [--branches 3] [--formats int8,int4] [--json]

One process computes what G = --branches ranks would get, bit for bit in the all-reduces.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from megatron_spd.calibration.text import read_text, token_batches
from megatron_spd.checkpoint.hf import CheckpointReader
from megatron_spd.collective import FULL, CollectiveFormat
from megatron_spd.evaluate.perplexity import plan_perplexity
from megatron_spd.plan import SPDPlan
from megatron_spd.report.tables import text_table
from megatron_spd.runtime.distributed import initialize
from megatron_spd.stages import make_streamer


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each format: where, bits on the wire for each value, perplexity and its change in per cent."""
    reader = CheckpointReader(args.model)
    tokens = token_batches(reader.tokenizer(), read_text(args.data), args.sequences, args.seq_length)
    streamer = make_streamer(reader, initialize(), micro_batch=args.sequences)
    plan = SPDPlan.dense(reader.base_model(), args.branches)
    plain = plan_perplexity(streamer, plan, tokens)[0]
    rows: list[dict[str, Any]] = [{"format": FULL, "points": "all", "bits": 32.0, "perplexity": plain}]
    for name in args.formats.split(","):
        bits = 8 * CollectiveFormat.parse(name).bytes_per_value
        for points in args.points.split(","):
            pair = (name if points != "mlp" else FULL, name if points != "attention" else FULL)
            perplexity = plan_perplexity(streamer, plan.with_collectives(*pair), tokens)[0]
            rows.append({"format": name, "points": points, "bits": bits, "perplexity": perplexity})
    return [row | {"change": 100 * (row["perplexity"] / plain - 1)} for row in rows]


def main() -> None:
    """Print the table, and with --json one JSON object as the last line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", default=None)
    parser.add_argument("--branches", type=int, default=3)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--formats", default="int8,int6,int5,int4:g32,int4:g64,int4/int8,int3,int2")
    parser.add_argument("--points", default="all", help="all, attention, mlp, commas between")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = measure(args)
    cells = [
        (r["format"], r["points"], f"{r['bits']:.2f}", f"{r['perplexity']:.3f}", f"{r['change']:+.3f} %")
        for r in rows
    ]
    print(text_table(("format", "points", "bits per value", "perplexity", "change"), cells))
    if args.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
