"""Block-to-block steps through the DeepSpeed engine against a bare PyTorch loop over the same two blocks.

Both sides train a student with dropped attention point on the outputs of the same teacher block, with the same
batches, loss, clipping and AdamW settings; the bare loop calls ``torch.optim.AdamW`` itself.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from typing import Any

import torch
from timing import Comparison, interleave, options, run, tokens_of
from torch import Tensor

from megatron_spd.calibration.stream import BlockStreamer
from megatron_spd.checkpoint.hf import CheckpointReader
from megatron_spd.distill.engine import EngineSettings, deepspeed_config, make_engine
from megatron_spd.distill.losses import make_loss
from megatron_spd.models.build import BlockUnit
from megatron_spd.plan import BlockSchedule
from megatron_spd.runtime.distributed import Runtime

TARGET = 1.25

#: One optimizer step on input and target, both [s, b, h]: its loss.
Step = Callable[[Tensor, Tensor], float]


def engine_step(student: BlockUnit, config: dict[str, Any], loss_name: str) -> Step:
    """A step as ``megatron_spd.distill.recipe`` makes it."""
    engine, loss_of = make_engine(student, config), make_loss(loss_name)

    def step(x: Tensor, target: Tensor) -> float:
        loss = loss_of(engine(x), target)
        engine.backward(loss)
        engine.step()
        return float(loss.detach())

    return step


def bare_step(student: BlockUnit, config: dict[str, Any], loss_name: str) -> Step:
    """The same step without DeepSpeed. Its learning rate stays at the greatest."""
    given = {k: config["optimizer"]["params"][k] for k in ("lr", "betas", "eps", "weight_decay")}
    parameters, loss_of = list(student.parameters()), make_loss(loss_name)
    optimizer = torch.optim.AdamW(parameters, **given)

    def step(x: Tensor, target: Tensor) -> float:
        loss = loss_of(student(x), target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config["gradient_clipping"])
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def measure(
    args: argparse.Namespace, reader: CheckpointReader, runtime: Runtime
) -> tuple[list[Comparison], dict[str, Any]]:
    base = reader.base_model()
    base.check_branches(args.branches)
    block = base.num_layers // 2
    streamer = BlockStreamer(reader, runtime, torch.float32, reader.block, args.micro_batch_size)
    inputs = streamer.embed(tokens_of(reader, args))
    for i in range(block):
        inputs = streamer.advance(i, inputs)
    pairs = list(zip(inputs, streamer.advance(block, inputs), strict=True))
    settings = EngineSettings(
        learning_rate=5e-5,
        micro_batch_size=args.micro_batch_size,
        gradient_accumulation=1,
        gradient_clipping=1.0,
        weight_decay=0.0,
        warmup_ratio=0.05,
        zero_stage=args.zero_stage,
        dtype="fp32",
    )
    config = deepspeed_config(settings, args.steps * (args.repeats + 1))

    def steps(make: Callable[[BlockUnit, dict[str, Any], str], Step]) -> Callable[[], list[float]]:
        student = BlockUnit(
            streamer.shape, [BlockSchedule(args.branches, drop_attention=True)], runtime, torch.float32
        )
        student.load_block(0, reader.block(block))
        step, batches = make(student.train(), config, "mse"), itertools.cycle(pairs)
        return lambda: [step(*next(batches)) for _ in range(args.steps)]

    ours, reference = steps(engine_step), steps(bare_step)
    # The first calls warm up, and show that both sides train the same thing.
    first = [side()[0] for side in (ours, reference)]
    name = f"{args.steps} steps of {args.micro_batch_size} sequences, ZeRO {args.zero_stage}"
    comparison = interleave(name, ours, reference, args, TARGET)
    return [comparison], {"first_losses": first, "branches": args.branches, "steps": args.steps}


if __name__ == "__main__":
    parser = options(__doc__ or "", sequences=8, seq_length=256, repeats=9)
    parser.add_argument(
        "--branches", type=int, default=3, help="branches of the student, all in this process"
    )
    parser.add_argument("--micro-batch-size", type=int, default=4, help="sequences in a step")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps in one measurement")
    parser.add_argument(
        "--zero-stage", type=int, choices=(0, 1, 2), default=0, help="ZeRO stage of the engine"
    )
    sys.exit(run("distill_step", parser, measure))
