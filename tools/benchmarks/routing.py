"""Who chooses a token's experts, every branch or the first one: what either costs in accuracy and in bytes.

usage: python tools/benchmarks/routing.py --model PLAIN --data FILE --branches G [--sequences 8] [--json]

One attention point is dropped at a time. Error: squared error of the block's output against the plain model's, relative
to the energy of what the block adds to its input. KL: KL(plain || SPD) of predictions in nats, with all attention
points dropped.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_spd.calibration.scoring import OutputLayer
from megatron_spd.calibration.stream import BlockStreamer
from megatron_spd.calibration.text import read_text, token_batches
from megatron_spd.checkpoint.hf import CheckpointReader
from megatron_spd.comm.routing import routing_bytes
from megatron_spd.errors import UserError
from megatron_spd.plan import ROUTINGS, SPDPlan
from megatron_spd.report.tables import text_table
from megatron_spd.runtime.distributed import initialize
from megatron_spd.stages import make_streamer


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """``blocks``: errors by block and routing; ``kl`` by routing; ``bytes`` that one decision for all sends for each
    token and dropped point, beside those of the all-reduce that was dropped."""
    reader = CheckpointReader(args.model)
    experts = reader.settings.experts
    if experts is None:
        raise UserError(f"{args.model} has no experts (model_type {reader.family.model_type!r})")
    tokens = token_batches(reader.tokenizer(), read_text(args.data), args.sequences, args.seq_length)
    streamer = make_streamer(reader, initialize(), micro_batch=args.sequences)
    plans = {
        routing: dataclasses.replace(SPDPlan.dense(reader.base_model(), args.branches), routing=routing)
        for routing in ROUTINGS
    }
    attentions = range(0, 2 * reader.num_layers, 2)
    return {
        "blocks": list(_blocks(streamer, plans, tokens)),
        "kl": {r: _divergence(streamer, plan.with_drops(attentions), tokens) for r, plan in plans.items()},
        "bytes": {
            "routing": routing_bytes(1, experts.chosen, torch.float32.itemsize),
            "all-reduce": reader.hidden_size * torch.float32.itemsize,
        },
        "tokens": tokens.numel(),
    }


def _blocks(streamer: BlockStreamer, plans: dict[str, SPDPlan], tokens: Tensor) -> Iterator[dict[str, Any]]:
    x = streamer.embed(tokens)
    for block in range(streamer.num_layers):
        wanted = streamer.advance(block, x)
        added = sum(float((w - i).double().square().sum()) for w, i in zip(wanted, x, strict=True))
        errors = {"block": block}
        for routing, plan in plans.items():
            schedule = plan.with_drops([2 * block]).block_schedule(block)
            got, _ = streamer.advance_pending(block, schedule, x, [None] * len(x))
            missed = sum(float((g - w).double().square().sum()) for g, w in zip(got, wanted, strict=True))
            errors[routing] = missed / added
        yield errors
        x = wanted


def _divergence(streamer: BlockStreamer, plan: SPDPlan, tokens: Tensor) -> float:
    """KL(plain || SPD) in nats for each token."""
    x, wanted = streamer.embed(tokens), streamer.embed(tokens)
    pending: list[Tensor | None] = [None] * len(x)
    for block in range(plan.num_layers):
        wanted = streamer.advance(block, wanted)
        x, pending = streamer.advance_pending(block, plan.block_schedule(block), x, pending)
    head = OutputLayer(streamer.reader.final_norm(), streamer.reader.output_table())
    pairs = zip(x, wanted, strict=True)
    return float(torch.cat([head.divergence(*(t[:-1].flatten(0, 1) for t in pair)) for pair in pairs]).mean())


def main() -> None:
    """Print the tables, and with --json one JSON object as the last line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", default=None)
    parser.add_argument("--branches", type=int, required=True)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    try:
        result = measure(args)
    except UserError as error:
        parser.error(str(error))
    rows = [(str(b["block"]), *(f"{b[r]:.5f}" for r in ROUTINGS)) for b in result["blocks"]]
    print(text_table(("block", "error, every branch routes", "error, the first routes"), rows))
    print(
        f"KL, all attention points dropped: {result['kl']['branch']:.5f} and {result['kl']['first']:.5f} nats"
    )
    sizes = result["bytes"]
    print(
        f"one decision sends {sizes['routing']} bytes a token, where an all-reduce of {sizes['all-reduce']} was dropped"
    )
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
