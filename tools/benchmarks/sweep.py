"""Algorithm 1's sweep against the naive one: for every candidate a full forward of a GPTModel with its loss.

The naive side is measured on a few candidates, evenly spread from "every attention point dropped" to "none
dropped", and scaled up to their number: its time for a candidate changes evenly with the number of dropped
points. Its models are built outside the measured time; reading the weights block by block is inside the time of
our sweep.
"""

from __future__ import annotations

import argparse
import math
import sys
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from timing import Comparison, clocked, options, run, tokens_of
from torch import Tensor

from megatron_spd.calibration.stream import BlockStreamer, model_shape
from megatron_spd.checkpoint.hf import CheckpointReader
from megatron_spd.errors import UserError
from megatron_spd.models.build import build_gpt_model
from megatron_spd.plan import SPDPlan
from megatron_spd.runtime.distributed import Runtime
from megatron_spd.sensitivity.sweep import sweep

TARGET = 0.55


class NaiveSweep:
    """Whole models of some candidates.

    ``starts``: a candidate drops the attention points from that block on; L drops none.
    """

    def __init__(
        self, reader: CheckpointReader, runtime: Runtime, tokens: Tensor, args: argparse.Namespace
    ) -> None:
        layers = reader.base_model().num_layers
        self.candidates = layers + 1
        if not 2 <= args.candidates <= self.candidates:
            raise UserError(f"--candidates is {args.candidates}; it must be in 2..{self.candidates}")
        self.starts = [round(k * layers / (args.candidates - 1)) for k in range(args.candidates)]
        self.batches = tokens.to(runtime.device).split(args.micro_batch)
        dense = SPDPlan.dense(reader.base_model(), args.branches)
        plans = [dense.with_drops([2 * block for block in range(start, layers)]) for start in self.starts]
        self.models = [
            build_gpt_model(model_shape(reader), p, reader.block, reader.get, runtime, torch.float32).eval()
            for p in plans
        ]

    def perplexities(self) -> list[float]:
        """One of each candidate that was built."""
        return [self._perplexity(model) for model in self.models]

    @torch.no_grad()
    def _perplexity(self, model: GPTModel) -> float:
        total, count = 0.0, 0
        for batch in self.batches:
            length = batch.shape[1]
            mask = torch.ones(length, length, dtype=torch.bool, device=batch.device).triu(1)[None, None]
            positions = torch.arange(length, device=batch.device).expand_as(batch)
            losses = model(batch, positions, mask, labels=batch.roll(-1, 1))[:, :-1]
            total, count = total + float(losses.double().sum()), count + losses.numel()
        return math.exp(total / count)


def measure(
    args: argparse.Namespace, reader: CheckpointReader, runtime: Runtime
) -> tuple[list[Comparison], dict[str, Any]]:
    tokens = tokens_of(reader, args)
    naive = NaiveSweep(reader, runtime, tokens, args)
    scale = naive.candidates / len(naive.starts)

    def ours() -> dict[str, Any]:
        streamer = BlockStreamer(reader, runtime, torch.float32, reader.block, args.micro_batch)
        return sweep(streamer, tokens, args.branches, method="algorithm1", which="attention")

    naive.perplexities()  # warms up
    seconds, reference = [], []
    for _ in range(args.repeats):
        # The sweep takes long enough for the machine to change: measure the naive side before and after it.
        before, expected = clocked(naive.perplexities, args.clock)
        taken, result = clocked(ours, args.clock)
        after, _ = clocked(naive.perplexities, args.clock)
        seconds.append(taken)
        reference.append((before + after) / 2 * scale)
    name = f"{naive.candidates} candidates, naive time scaled up from {len(naive.starts)}"
    by_start = {e["block"]: e["perplexity"] for e in result["algorithm1"]} | {
        naive.candidates - 1: result["plain_perplexity"]
    }
    facts = {
        "branches": args.branches,
        "candidates": naive.candidates,
        "candidates_measured": len(naive.starts),
        "perplexities": [by_start[start] for start in naive.starts],
        "reference_perplexities": expected,
    }
    return [Comparison(name, seconds, reference, TARGET)], facts


if __name__ == "__main__":
    parser = options(__doc__ or "", sequences=8, seq_length=256, repeats=3)
    parser.add_argument("--branches", type=int, default=3, help="branches, all in this process")
    parser.add_argument(
        "--candidates", type=int, default=3, help="candidates that the naive side computes in a repeat"
    )
    parser.add_argument(
        "--micro-batch", type=int, default=8, help="sequences computed at a time on both sides"
    )
    sys.exit(run("sweep", parser, measure))
