"""One unit of block-to-block distillation: its student, its DeepSpeed engine, its held-out loss."""

from __future__ import annotations

import gc
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_spd.calibration.stream import BlockWeights
from megatron_spd.distill.batches import example_order, replica_batches
from megatron_spd.distill.engine import deepspeed_config, end_engine, make_engine
from megatron_spd.distill.gather import full_block
from megatron_spd.distill.loop import BestState, TrainingLoop
from megatron_spd.distill.losses import Loss
from megatron_spd.distill.settings import DistillSettings
from megatron_spd.distill.tracking import Tracker
from megatron_spd.errors import UserError
from megatron_spd.models.build import DTYPES, BlockUnit, ModelShape
from megatron_spd.plan import SPDPlan
from megatron_spd.runtime.distributed import Runtime, tensor_parallel_seed


@dataclass(frozen=True)
class UnitData:
    """Hidden states [s, n, h] around a unit: ``teacher`` and ``own``, the teacher's and the student's own in front
    of it (None where they are not asked for), and the teacher's behind it, the ``targets``. The last ``judges``
    sequences are held out."""

    teacher: Tensor | None
    own: Tensor | None
    targets: Tensor
    judges: int

    @property
    def training(self) -> int:
        """How many sequences are trained on."""
        return self.targets.shape[1] - self.judges

    def examples(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and targets, [s, b, h] each, of the examples ``numbers`` [b] (see ``batches.example_order``)."""
        sequences = numbers % self.training
        if self.teacher is None or self.own is None:
            inputs = self.own if self.teacher is None else self.teacher
            assert inputs is not None
            return inputs[:, sequences], self.targets[:, sequences]
        own = (numbers >= self.training).to(self.targets.device)[None, :, None]
        mixed = torch.where(own, self.own[:, sequences], self.teacher[:, sequences])
        return mixed, self.targets[:, sequences]

    def held_out(self) -> tuple[Tensor, Tensor]:
        """Inputs as they will be at run time (the student's own, where there are any) and targets, of what
        judges."""
        inputs = self.teacher if self.own is None else self.own
        assert inputs is not None
        return inputs[:, self.training :], self.targets[:, self.training :]


class UnitTrainer:
    """Trains the blocks ``unit`` of ``plan``, started from ``weights``."""

    def __init__(
        self,
        shape: ModelShape,
        plan: SPDPlan,
        unit: range,
        weights: BlockWeights,
        runtime: Runtime,
        settings: DistillSettings,
        loss: Loss,
        tracker: Tracker,
    ) -> None:
        self.runtime, self.unit, self.settings, self.tracker = runtime, unit, settings, tracker
        self.branches = plan.branches
        self.loss, self.micro_batch = loss, settings.batching()[0]
        self.dtype = DTYPES[settings.engine.dtype]
        schedules = [plan.block_schedule(i) for i in unit]
        self.student = BlockUnit(shape, schedules, runtime, self.dtype)
        self.names = []
        for index, block in enumerate(unit):
            given = weights(block)
            self.student.load_block(index, given)
            self.names.append(list(given))
        self.engine: Any = None

    def run(self, data: UnitData, seconds: float | None) -> dict[str, Any]:
        """Train on ``data`` and leave the best state in the student; ``seconds``: stop then, if given.

        The record has ``blocks``, the held-out ``loss_before`` and ``loss_after`` (of the best state),
        ``best_step``, ``kept`` (False where no state was better than the initial one), the ``losses`` of the steps,
        and ``held_out``, [step, loss] of each judgement. Raises UserError if the hidden states are not finite.
        """
        before = self._held_out_loss(data)
        if not (bool(torch.isfinite(data.targets).all()) and math.isfinite(before)):
            raise UserError(
                f"the hidden states behind {unit_name(self.unit)} are not finite on this text: the model's "
                "activations overflow or hold NaN; check the checkpoint, or use --dtype fp32"
            )
        best = BestState(self.student, before)
        batches = self._batches(data)
        self.engine = make_engine(self.student, deepspeed_config(self.settings.engine, len(batches)))
        tensor_parallel_seed(self.settings.seed + self.unit.start)
        loop = TrainingLoop(
            self.runtime,
            self.engine,
            lambda batch: self._loss(data, batch),
            lambda: self._held_out_loss(data),
            best,
            self.tracker,
            f"distil {unit_name(self.unit)}",
            f"unit {self.unit.start}",
        )
        loop.run(batches, seconds)
        best.restore()
        return {
            "blocks": list(self.unit),
            "loss_before": before,
            "loss_after": best.loss,
            "best_step": best.step,
            "kept": best.step > 0,
            "losses": loop.losses,
            "held_out": loop.held_out,
        }

    def _batches(self, data: UnitData) -> list[list[Tensor]]:
        """This replica's micro-batches of every step, the same on all ranks of a replica."""
        count = self.settings.examples(data.training, data.targets.shape[0])
        seed = self.settings.seed * 1_000_003 + self.unit.start
        order = example_order(data.training, count, seed, self.settings.inputs)
        return replica_batches(order, self.settings, self.runtime.dp_rank, self.runtime.dp_size)

    def _loss(self, data: UnitData, batch: Tensor) -> Tensor:
        x, target = (t.to(self.dtype) for t in data.examples(batch))
        return self.loss(self.engine(x), target)

    @torch.no_grad()
    def _held_out_loss(self, data: UnitData) -> float:
        self.student.eval()
        inputs, targets = data.held_out()
        total = 0.0
        pairs = zip(inputs.split(self.micro_batch, 1), targets.split(self.micro_batch, 1), strict=True)
        for x, target in pairs:
            x, target = x.to(self.dtype).contiguous(), target.to(self.dtype)
            total += float(self.loss(self.student(x), target)) * x.shape[1]
        # The ranks must agree to the bit on what is best.
        return self.runtime.from_main(total / inputs.shape[1])

    def full_weights(self) -> dict[int, dict[str, Tensor]]:
        """The student's blocks as full Hugging Face tensors on the main rank (empty elsewhere): a collective
        of the replica."""
        layers = zip(self.unit, self.student.blocks.layers, self.names, strict=True)
        shape, branches = self.student.shape, self.branches
        return {
            block: full_block(layer, names, shape, branches, self.runtime) for block, layer, names in layers
        }

    def close(self) -> None:
        """Free the engine's memory before the next unit is built."""
        if self.engine is not None:
            end_engine(self.engine)
        self.engine = None
        self.student = None  # type: ignore[assignment]
        gc.collect()


def unit_name(unit: range) -> str:
    """ "block 7" or "blocks 7..9"."""
    return f"block {unit.start}" if len(unit) == 1 else f"blocks {unit.start}..{unit.stop - 1}"
