"""Where the error of an SPD export sits: behind each block, and by token position.

usage: python tools/benchmarks/error_map.py --model EXPORT --against PLAIN --data FILE [--sequences 8] [--json]

Blocks: the squared error of the synced hidden state against the plain model's, relative to the state's energy; first
positions and massive tokens are left out. Positions: the divergence KL(plain || SPD) of predictions in nats, averaged
over ranges of positions. A branch's share is that of the error between what it reads and what it would read if
everything were synced, summed over the dropped MLP points behind which blocks end.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from torch import Tensor

from megatron_spd.calibration.scoring import OutputLayer
from megatron_spd.calibration.stream import BlockStreamer
from megatron_spd.calibration.text import read_text, token_batches
from megatron_spd.checkpoint.hf import CheckpointReader
from megatron_spd.errors import UserError
from megatron_spd.grouping.shift import ordinary_tokens
from megatron_spd.plan import SPDPlan
from megatron_spd.report.tables import text_table
from megatron_spd.runtime.distributed import initialize
from megatron_spd.stages import make_streamer

#: Where ranges of positions end.
_ENDS = (4, 16, 64, 128, 256, 512, 1024, 2048)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """``blocks``: for each, the relative error behind it and what is dropped in it; ``positions``; ``branches``."""
    reader, plain_reader = CheckpointReader(args.model), CheckpointReader(args.against)
    if reader.plan is None:
        raise UserError(f"{args.model} is a plain model; give an SPD export and the plain model as --against")
    tokens = token_batches(reader.tokenizer(), read_text(args.data), args.sequences, args.seq_length)
    runtime = initialize()
    student = make_streamer(reader, runtime, micro_batch=args.sequences)
    plain = make_streamer(plain_reader, runtime, micro_batch=args.sequences)
    return _walk(reader.plan, student, plain, tokens) | {"tokens": tokens.numel() - len(tokens)}


def _walk(plan: SPDPlan, student: BlockStreamer, plain: BlockStreamer, tokens: Tensor) -> dict[str, Any]:
    x, wanted = student.embed(tokens), plain.embed(tokens)
    pending: list[Tensor | None] = [None] * len(x)
    blocks, branches = [], torch.zeros(plan.branches, dtype=torch.float64)
    for block in range(plan.num_layers):
        schedule = plan.block_schedule(block)
        wanted = plain.advance(block, wanted)
        x, pending = student.advance_pending(block, schedule, x, pending)
        error = energy = 0.0
        for mine, p, theirs in zip(x, pending, wanted, strict=True):
            ordinary = ordinary_tokens(theirs)
            synced = mine if p is None else mine + p.sum(0)
            error += float((synced - theirs)[ordinary].double().square().sum())
            energy += float(theirs[ordinary].double().square().sum())
            if p is not None:
                branches += (p.sum(0) - p)[:, ordinary].double().square().sum((1, 2))
        dropped = [k for k, d in (("attention", schedule.drop_attention), ("mlp", schedule.drop_mlp)) if d]
        blocks.append({"block": block, "dropped": dropped, "error": error / energy})
    return {
        "blocks": blocks,
        "positions": _by_position(plain, x, wanted),
        "branches": (branches / branches.sum()).tolist() if branches.sum() else [],
    }


def _by_position(plain: BlockStreamer, x: list[Tensor], wanted: list[Tensor]) -> list[dict[str, Any]]:
    reader = plain.reader
    head = OutputLayer(reader.final_norm(), reader.output_table())
    parts = []
    for mine, theirs in zip(x, wanted, strict=True):
        rows = [states[:-1].flatten(0, 1).float() for states in (mine, theirs)]
        parts.append(head.divergence(*rows).view(len(mine) - 1, -1))
    kl = torch.cat(parts, 1).mean(1)
    starts = (0, *_ENDS)
    ranges = [(a, min(b, len(kl))) for a, b in zip(starts, _ENDS, strict=False) if a < len(kl)]
    return [{"from": a, "to": b - 1, "kl": float(kl[a:b].mean())} for a, b in ranges]


def main() -> None:
    """Print the tables, and with --json one JSON object as the last line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--against", required=True)
    parser.add_argument("--data", default=None)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    try:
        result = measure(args)
    except UserError as error:
        parser.error(str(error))
    rows = [(str(b["block"]), " + ".join(b["dropped"]), f"{b['error']:.4f}") for b in result["blocks"]]
    print(text_table(("block", "dropped", "error behind it"), rows))
    ranges = [(f"{p['from']} to {p['to']}", f"{p['kl']:.4f}") for p in result["positions"]]
    print(text_table(("position", "KL, nats"), ranges))
    shares = [(str(g), f"{share:.3f}") for g, share in enumerate(result["branches"])]
    if shares:
        print(text_table(("branch", "share of what branches miss"), shares))
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
