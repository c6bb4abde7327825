"""An SPD block against Megatron-core's stock block, in one process and so without communication.

With G = 1 both compute the same thing, and the ratio is what the SPD layer itself costs. With more branches in
the one process the ratio adds what it costs to compute every branch's MLP on its own input; for information,
since a tensor-parallel run with M = G has one branch on a rank.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from timing import Comparison, Side, interleave, options, run, tokens_of
from torch import Tensor

from megatron_spd.calibration.stream import BlockStreamer
from megatron_spd.checkpoint.hf import CheckpointReader
from megatron_spd.models.build import BlockUnit
from megatron_spd.plan import BlockSchedule
from megatron_spd.runtime.distributed import Runtime

TARGET = 1.03


def make_sides(block: BlockUnit, x: Tensor) -> dict[str, Side]:
    """Evaluation's forward, and training's forward with backward to weights and input, of ``x`` [s, b, h]."""
    upstream = torch.ones_like(x)
    leaf = x.clone().requires_grad_()

    @torch.no_grad()
    def forward() -> Tensor:
        block.eval()
        return block.layer_forward(x, None)[0]

    def both() -> None:
        block.train().zero_grad()
        leaf.grad = None
        block.layer_forward(leaf, None)[0].backward(upstream)

    return {"forward": forward, "forward + backward": both}


def measure(
    args: argparse.Namespace, reader: CheckpointReader, runtime: Runtime
) -> tuple[list[Comparison], dict[str, Any]]:
    reader.base_model().check_branches(args.branches)
    streamer = BlockStreamer(reader, runtime, torch.float32, reader.block, micro_batch=args.sequences)
    x = streamer.embed(tokens_of(reader, args))[0]
    weights = reader.block(0)

    def sides(schedule: BlockSchedule) -> dict[str, Side]:
        block = BlockUnit(streamer.shape, [schedule], runtime, torch.float32)
        block.load_block(0, weights)
        return make_sides(block, x)

    stock = sides(BlockSchedule(1))
    comparisons = []
    facts: dict[str, Any] = {}
    for branches in sorted({1, args.branches}):
        spd = sides(BlockSchedule(branches, drop_attention=True))
        if branches == 1:
            facts["largest_difference"] = float((spd["forward"]() - stock["forward"]()).abs().max())
        for name, side in spd.items():
            side(), stock[name]()  # warms up
            target = TARGET if branches == 1 else None
            comparisons.append(interleave(f"G = {branches}, {name}", side, stock[name], args, target))
    # The worse of the two that have a target is the figure.
    return sorted(comparisons, key=lambda c: (c.target is None, -c.summary()["ratio"])), facts


if __name__ == "__main__":
    parser = options(__doc__ or "", sequences=2, seq_length=256, repeats=30)
    parser.add_argument(
        "--branches", type=int, default=3, help="branches in one process of the informative comparison"
    )
    sys.exit(run("layer", parser, measure))
