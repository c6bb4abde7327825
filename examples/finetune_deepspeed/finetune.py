"""Fine-tune an SPD model with DeepSpeed: ZeRO over Megatron-core's tensor parallelism.

    deepspeed --num_gpus 4 examples/finetune_deepspeed/finetune.py --model EXPORT --out TRAINED \
        --tensor-parallel 2 --zero-stage 2 --steps 100
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_spd.distill.engine import EngineSettings, deepspeed_config, end_engine, make_engine
from megatron_spd.finetune.checkpoint import FinetuneCheckpoints, Progress, prepare_for_universal
from megatron_spd.finetune.loss import NextTokenLoss
from megatron_spd.finetune.script import FinetuneOptions, Session, run_script
from megatron_spd.layers.norm import sum_gradients_in_backward
from megatron_spd.options import option
from megatron_spd.parsing import parse_options


@dataclass(kw_only=True)
class Options(FinetuneOptions):
    zero_stage: int = option("ZeRO stage", 1)
    gradient_clipping: float = option("greatest norm of a step's gradient", 1.0)
    deepspeed_config: str | None = option("ds_config.json; what it sets wins over the options", None)
    checkpoint: str | None = option("folder of checkpoints, from which the same command goes on", None)
    save_every: int = option("steps from one checkpoint to the next", 100)


def finetune(arguments: Sequence[str]) -> dict[str, Any]:
    """Train as ``arguments`` say; the losses of the steps and of held-out text, in nats."""
    options = parse_options(Options, list(arguments), "finetune.py")
    session = options.start()
    # DeepSpeed does not know which gradients sequence parallelism leaves partial.
    sum_gradients_in_backward(session.model, session.runtime.tp_group)
    module = NextTokenLoss(session.model, session.runtime, session.vocab_size)
    prepare_for_universal(module)
    config = deepspeed_config(settings_of(options, session), options.steps)
    checkpoints = checkpoints_of(options, session, config)
    engine = make_engine(module, checkpoints.adapt(config))
    try:
        progress = checkpoints.resume(engine) or Progress(held_out_loss(engine, session))
        for batch in session.batches[len(progress.losses) :]:
            progress.losses.append(step(engine, batch, options.micro_batch_size, session))
            checkpoints.save_if_due(engine, progress)
        before, after = progress.loss_before, held_out_loss(engine, session)
        session.export(options.out, options.facts("deepspeed", before, after))
    finally:
        end_engine(engine)
    return {"losses": progress.losses, "loss_before": before, "loss_after": after, "out": options.out}


def settings_of(options: Options, session: Session) -> EngineSettings:
    return EngineSettings(
        learning_rate=options.learning_rate,
        micro_batch_size=options.micro_batch_size,
        gradient_accumulation=len(session.batches[0]) // options.micro_batch_size,
        gradient_clipping=options.gradient_clipping,
        weight_decay=options.weight_decay,
        warmup_ratio=0.1,
        zero_stage=options.zero_stage,
        dtype=options.dtype,
        config_file=options.deepspeed_config,
    )


def checkpoints_of(options: Options, session: Session, config: dict[str, Any]) -> FinetuneCheckpoints:
    names = ("optimizer", "scheduler", "gradient_clipping", "zero_optimization")
    identity = options.identity(session.plan) | {name: config.get(name) for name in names}
    branches = session.plan.branches
    return FinetuneCheckpoints(options.checkpoint, options.save_every, identity, branches, session.runtime)


def step(engine: Any, tokens: Tensor, micro_batch: int, session: Session) -> float:
    """One optimizer step on this replica's ``tokens`` [n, s + 1]: the mean loss of all replicas before it."""
    losses = []
    for batch in tokens.to(session.runtime.device).split(micro_batch):
        loss = engine(batch)
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach())
    return mean_over_replicas(torch.stack(losses).mean(), session)


@torch.no_grad()
def held_out_loss(engine: Any, session: Session) -> float:
    """The mean loss on the held-out text of all replicas."""
    engine.eval()
    pieces = session.held_out.to(session.runtime.device).split(1)
    loss = mean_over_replicas(torch.stack([engine(piece) for piece in pieces]).mean(), session)
    engine.train()
    return loss


def mean_over_replicas(loss: Tensor, session: Session) -> float:
    dist.all_reduce(loss, group=session.runtime.dp_group)
    return float(loss) / session.runtime.dp_size


if __name__ == "__main__":
    sys.exit(run_script(finetune))
