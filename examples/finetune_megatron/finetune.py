"""Fine-tune an SPD model with Megatron-core's data parallelism, pipeline schedules and optimizers.

    torchrun --nproc_per_node 4 examples/finetune_megatron/finetune.py --model EXPORT --out TRAINED \
        --tensor-parallel 2 --pipeline-parallel 2 --steps 100
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_spd.finetune.megatron import MegatronTrainer
from megatron_spd.finetune.script import FinetuneOptions, run_script
from megatron_spd.options import option
from megatron_spd.parsing import parse_options


@dataclass(kw_only=True)
class Options(FinetuneOptions):
    pipeline_parallel: int = option("pipeline stages", 1)
    first_stage: int | None = option("blocks of the first stage; default: as many as the others have", None)
    distributed_optimizer: bool = option("spread the optimizer's state over the replicas", False)


def finetune(arguments: Sequence[str]) -> dict[str, Any]:
    """Train as ``arguments`` say; the losses of the steps and of held-out text, in nats."""
    options = parse_options(Options, list(arguments), "finetune.py")
    uneven = {"num_layers_in_first_pipeline_stage": options.first_stage}
    session = options.start(options.pipeline_parallel, **uneven)
    trainer = MegatronTrainer(
        session.model,
        session.runtime,
        session.vocab_size,
        options.learning_rate,
        options.weight_decay,
        options.distributed_optimizer,
    )
    before = trainer.loss(session.held_out)
    losses = [trainer.step(batch, options.micro_batch_size) for batch in session.batches]
    after = trainer.loss(session.held_out)
    session.export(options.out, options.facts("megatron-core", before, after))
    return {"losses": losses, "loss_before": before, "loss_after": after, "out": options.out}


if __name__ == "__main__":
    sys.exit(run_script(finetune))
