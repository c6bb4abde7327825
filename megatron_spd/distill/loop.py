"""The training loop of block-to-block distillation and of the finishing pass: steps, judging, the best state
kept."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from megatron_spd.comm.all_reduce import all_reduce
from megatron_spd.distill.engine import whole
from megatron_spd.distill.tracking import Tracker
from megatron_spd.progress import progress_bar
from megatron_spd.runtime.distributed import Runtime

#: How often a training is judged on held-out sequences, its end included.
EVALUATIONS = 8


class BestState:
    """The trainable parameters of ``model`` at the least held-out loss so far, copied to the CPU.

    ``loss`` starts as that of the untouched model, which stays the best, at ``step`` 0, until one is below it.
    """

    def __init__(self, model: nn.Module, loss: float) -> None:
        self.loss, self.step = loss, 0
        self.tensors: dict[str, Tensor] = {}
        self._parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def offer(self, step: int, loss: float) -> None:
        """Take the model's state after ``step`` steps if its ``loss`` is below the best (NaN never is)."""
        if loss < self.loss:
            self.resume(step, loss, {n: _copy(p) for n, p in self._parameters.items()})

    def resume(self, step: int, loss: float, tensors: dict[str, Tensor]) -> None:
        """Go on from a best state found earlier."""
        self.step, self.loss, self.tensors = step, loss, tensors

    @torch.no_grad()
    def restore(self) -> None:
        """Put the best state back into the model; nothing happens if there is none but the initial one."""
        for name, tensor in self.tensors.items():
            with whole([self._parameters[name]], write=True):
                self._parameters[name].copy_(tensor)


def _copy(parameter: nn.Parameter) -> Tensor:
    """The whole ``parameter`` on the CPU."""
    with whole([parameter]):
        return parameter.detach().to("cpu", copy=True)


class TrainingLoop:
    """Optimizer steps in a DeepSpeed ``engine``.

    Args:
        loss: the loss of a micro-batch of examples [b] through the engine.
        held_out_loss: the loss that judges, the same on all ranks; ``best`` keeps the state where it was least.
        name: what the progress bar says; ``curve``: the name of the curves that ``tracker`` gets.
    """

    def __init__(
        self,
        runtime: Runtime,
        engine: Any,
        loss: Callable[[Tensor], Tensor],
        held_out_loss: Callable[[], float],
        best: BestState,
        tracker: Tracker,
        name: str,
        curve: str,
    ) -> None:
        self.runtime, self.engine, self.tracker = runtime, engine, tracker
        self.name, self.curve = name, curve
        self.loss, self.held_out_loss, self.best = loss, held_out_loss, best
        #: The loss of every step, and [step, loss] of every judgement; a caller that goes on sets them.
        self.losses: list[float] = []
        self.held_out: list[list[float]] = [[0, best.loss]]

    def run(
        self,
        steps: list[list[Tensor]],
        seconds: float | None = None,
        after_step: Callable[[], None] = lambda: None,
    ) -> None:
        """Train on ``steps`` (micro-batches of each), from the first that ``losses`` does not have, until they or
        the ``seconds`` are over; ``after_step`` is called behind each."""
        count, done = len(steps), len(self.losses)
        marks = {round(k * count / EVALUATIONS) for k in range(1, EVALUATIONS + 1)}
        started = judged = time.monotonic()
        with progress_bar(self.runtime, self.name, count, "step") as bar:
            bar.update(done)
            for number in range(done + 1, count + 1):
                self._step(number, steps[number - 1])
                bar.update()
                bar.set_postfix_str(f"loss {self.losses[-1]:.4g}")
                over, due = self._clock(started, judged, seconds)
                if seconds is not None:
                    self._fit_schedule(number - done, count - done, started, seconds)
                if due or number in marks:
                    self._judge(number)
                    judged = time.monotonic()
                after_step()
                if over:
                    break

    def _clock(self, started: float, judged: float, seconds: float | None) -> tuple[bool, bool]:
        """Whether the time is over, and whether it asks for a judgement: a training that will be cut short is
        judged by the clock as well. The main rank's clock counts."""
        if seconds is None:
            return False, False
        now = time.monotonic()
        over = now - started > seconds
        return self.runtime.from_main((over, over or now - judged > seconds / EVALUATIONS))

    def _fit_schedule(self, done: int, count: int, started: float, seconds: float) -> None:
        """Let the learning rate end its way down where time ends the training: ``done`` of at most ``count`` steps of
        this process took the time since ``started``."""
        scheduler = self.engine.lr_scheduler
        if not hasattr(scheduler, "total_num_steps"):
            return  # a scheduler of the user's own
        before = len(self.losses) - done
        possible = int(seconds * done / max(1e-9, time.monotonic() - started))
        scheduler.total_num_steps = self.runtime.from_main(before + max(done + 1, min(count, possible)))

    def _step(self, number: int, batches: list[Tensor]) -> None:
        total = torch.zeros((), device=self.runtime.device)
        self.engine.train()
        for batch in batches:
            loss = self.loss(batch)
            self.engine.backward(loss)
            self.engine.step()
            total += loss.detach()
        total = all_reduce(total, self.runtime.dp_group) / (len(batches) * self.runtime.dp_size)
        self.losses.append(float(total))
        self.tracker.curve(self.curve, number, loss=self.losses[-1], lr=self.engine.get_lr()[0])

    def _judge(self, number: int) -> None:
        loss = self.held_out_loss()
        self.held_out.append([number, loss])
        self.best.offer(number, loss)
        self.tracker.curve(self.curve, number, held_out_loss=loss)
