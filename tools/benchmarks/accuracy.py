"""Zero-shot perplexity against the number of dropped sync points, calibrated and scored on one text.

usage: python tools/benchmarks/accuracy.py --model DIR --data FILE [--branches 3] [--drops 15,24,27,30] [--json]

The least sensitive attention points by Algorithm 1 are dropped; the last line drops every MLP point but those of the
blocks named by --mlp-kept and of the last one, on half of the sequences.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from megatron_spd.calibration.text import read_text, token_batches
from megatron_spd.checkpoint.hf import CheckpointReader
from megatron_spd.evaluate.perplexity import plan_perplexity
from megatron_spd.plan import SPDPlan
from megatron_spd.report.tables import text_table
from megatron_spd.runtime.distributed import initialize
from megatron_spd.sensitivity.sweep import sweep
from megatron_spd.sensitivity.tiers import choose_points, scores_from
from megatron_spd.stages import make_streamer


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Perplexities by what is dropped."""
    reader = CheckpointReader(args.model)
    tokens = token_batches(reader.tokenizer(), read_text(args.data), args.sequences, args.seq_length)
    streamer = make_streamer(reader, initialize(), micro_batch=args.sequences)
    plan = SPDPlan.dense(reader.base_model(), args.branches)
    scores = scores_from(sweep(streamer, tokens, args.branches, "algorithm1", "attention"), "attention")
    rows = {"plain": plan_perplexity(streamer, plan, tokens)[0]}
    for count in map(int, args.drops.split(",")):
        points = choose_points(scores, count, avoid_neighbours=False)
        rows[f"{count} attention points"] = plan_perplexity(streamer, plan.with_drops(points), tokens)[0]
    half = tokens[: args.sequences // 2]
    kept = {*map(int, args.mlp_kept.split(",")), plan.num_layers - 1}
    points = [2 * i + 1 for i in range(plan.num_layers) if i not in kept]
    rows[f"plain, {len(half)} sequences"] = plan_perplexity(streamer, plan, half)[0]
    rows[f"{len(points)} MLP points, {len(half)} sequences"] = plan_perplexity(
        streamer, plan.with_drops(points), half
    )[0]
    return rows


def main() -> None:
    """Print the table, and with --json one JSON object as the last line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", default=None)
    parser.add_argument("--branches", type=int, default=3)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--drops", default="15,24,27,30")
    parser.add_argument("--mlp-kept", default="0,2,6,11")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = measure(args)
    print(text_table(("dropped", "perplexity"), [(name, f"{value:.2f}") for name, value in rows.items()]))
    if args.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
