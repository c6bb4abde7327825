"""Full fine-tuning by Megatron-core: its DistributedDataParallel, its pipeline schedules, its optimizers.

Nothing here knows of sync points. It is what a Megatron-LM training script does, in the few lines that a model from
``models/build.py`` needs; on a machine without CUDA it runs over gloo.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_spd.errors import UserError
from megatron_spd.finetune.loss import stage_output, token_losses
from megatron_spd.runtime.cpu import cuda_on_cpu
from megatron_spd.runtime.distributed import Runtime


class MegatronTrainer:
    """Trains every parameter of ``model`` (this rank's stage) on the next token.

    ``lr`` and ``weight_decay`` (of matrices; Megatron-core lets vectors be) stay as they are.
    ``distributed_optimizer``: Megatron-core's, whose state is spread over the replicas. ``optimizer``: further fields
    of Megatron-core's OptimizerConfig (``clip_grad``, ``adam_beta2``, ``optimizer``, ...).
    """

    def __init__(
        self,
        model: GPTModel,
        runtime: Runtime,
        vocab_size: int,
        lr: float,
        weight_decay: float = 0.0,
        distributed_optimizer: bool = False,
        **optimizer: Any,
    ) -> None:
        self.runtime, self.vocab_size, self.config = runtime, vocab_size, model.config
        half = self.config.bf16
        settings = OptimizerConfig(
            lr=lr,
            min_lr=lr,
            weight_decay=weight_decay,
            bf16=half,
            params_dtype=self.config.params_dtype,
            use_distributed_optimizer=distributed_optimizer,
            **optimizer,
        )
        replicas = DistributedDataParallelConfig(
            grad_reduce_in_fp32=half, use_distributed_optimizer=distributed_optimizer
        )
        with cuda_on_cpu():
            self.model = DistributedDataParallel(self.config, replicas, model)
            self.optimizer = get_megatron_optimizer(settings, [self.model])
        # Sets the rate and the decay of every group of parameters; constant, it is not asked again.
        OptimizerParamScheduler(
            self.optimizer,
            init_lr=lr,
            max_lr=lr,
            min_lr=lr,
            lr_warmup_steps=0,
            lr_decay_steps=1,
            lr_decay_style="constant",
            start_wd=weight_decay,
            end_wd=weight_decay,
            wd_incr_steps=0,
            wd_incr_style="constant",
        )
        # Sums over replicas, of what sequence parallelism leaves partial, and of tied tables of two stages.
        self.config.finalize_model_grads_func = finalize_model_grads

    def step(self, tokens: Tensor, micro_batch: int = 1) -> float:
        """One optimizer step on this replica's ``tokens`` [n, s + 1], ``micro_batch`` sequences at a time: the mean
        loss of all replicas before it, in nats, on every rank."""
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        loss = self._run(tokens, micro_batch, forward_only=False)
        with cuda_on_cpu():
            self.optimizer.step()
        return loss

    def loss(self, tokens: Tensor, micro_batch: int = 1) -> float:
        """The mean loss on ``tokens`` as :meth:`step` gives it, without a step."""
        self.model.eval()
        try:
            return self._run(tokens, micro_batch, forward_only=True)
        finally:
            self.model.train()

    def _run(self, tokens: Tensor, micro_batch: int, forward_only: bool) -> float:
        check_batch(
            tokens, micro_batch, self.config.tensor_model_parallel_size, self.config.sequence_parallel
        )
        # Not for longer: the distributed optimizer holds the parameters' autograd nodes and those hold the model, which
        # the garbage collector does not see. With a way from the model to the optimizer neither would ever be freed.
        self.config.grad_scale_func = self.optimizer.scale_loss
        try:
            with cuda_on_cpu():
                losses = get_forward_backward_func()(
                    forward_step_func=self._forward,
                    data_iterator=iter(tokens.to(self.runtime.device).split(micro_batch)),
                    model=[self.model],
                    num_microbatches=len(tokens) // micro_batch,
                    seq_length=tokens.shape[1] - 1,
                    micro_batch_size=micro_batch,
                    forward_only=forward_only,
                )
        finally:
            self.config.grad_scale_func = None
        return self._mean(losses)

    def _forward(self, data: Iterator[Tensor], model: torch.nn.Module) -> tuple[Tensor, Any]:
        """Megatron-core's forward step: what the stage puts out, and what makes a loss of it on the last one."""
        tokens = next(data)
        return stage_output(model, tokens[:, :-1]), partial(self._loss, tokens[:, 1:])

    def _loss(self, labels: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        loss = token_losses(logits, labels, self.vocab_size, self.runtime).mean()
        return loss, loss.detach().clone()

    def _mean(self, losses: list[Tensor]) -> float:
        """The mean of the ``losses`` of the last stage over micro-batches and replicas, on every rank."""
        runtime = self.runtime
        mean = torch.stack(losses).mean() if losses else torch.zeros((), device=runtime.device)
        dist.all_reduce(mean, group=runtime.dp_group)
        if runtime.pp_group is not None and runtime.pp_size > 1:
            last = dist.get_global_rank(runtime.pp_group, runtime.pp_size - 1)
            dist.broadcast(mean, src=last, group=runtime.pp_group)
        return float(mean) / runtime.dp_size


def check_batch(tokens: Tensor, micro_batch: int, ranks: int, sequence_parallel: bool) -> None:
    """Raise UserError unless ``tokens`` [n, s + 1] divide into micro-batches, and s over ``ranks`` = M where sequences
    are cut."""
    count, length = tokens.shape[0], tokens.shape[1] - 1
    if count == 0 or count % micro_batch:
        raise UserError(
            f"{count} sequences for a step of one replica do not divide into micro-batches of {micro_batch}"
        )
    if sequence_parallel and length % ranks:
        raise UserError(
            f"sequences of {length} tokens do not divide by M = {ranks} ranks, which sequence parallelism needs"
        )
