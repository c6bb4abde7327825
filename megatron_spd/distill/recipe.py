"""Block-to-block distillation (SPD paper, section 4.2) inside DeepSpeed, on the student's own inputs too.

Teacher: the tensor-parallel blocks with every sync point kept. Student: the same blocks under the plan, started
from given weights. The student learns the teacher's output; its input is the teacher's (the paper), or what the
student's own earlier blocks make, which lets a block undo the errors of those before it, or half of each (method
section 7). The unit is a run of blocks joined by dropped MLP points, a single block in the paper's case.

Units are trained in order and are kept as files: a killed run starts again at its first unfinished unit. What a
unit sees depends on the stored weights of earlier units and on the seed alone, and so the run ends with the same
weights.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_spd.calibration.stream import BlockStreamer, BlockWeights
from megatron_spd.distill.fisher import FISHER_SEQUENCES, output_fisher
from megatron_spd.distill.losses import LOSSES, make_loss
from megatron_spd.distill.settings import DistillSettings
from megatron_spd.distill.tracking import Tracker
from megatron_spd.distill.trainer import UnitData, UnitTrainer
from megatron_spd.distill.units import UnitStore
from megatron_spd.errors import UserError
from megatron_spd.plan import SPDPlan


def units_to_train(plan: SPDPlan) -> list[range]:
    """The plan's units in which some block's recovery asks for distillation."""
    return [u for u in plan.units() if any(plan.blocks[i].recovery.endswith("b2b") for i in u)]


def distill(
    streamer: BlockStreamer,
    plan: SPDPlan,
    tokens: Tensor,
    settings: DistillSettings,
    store: UnitStore,
    tracker: Tracker,
    initial: BlockWeights | None = None,
) -> list[dict[str, Any]]:
    """Train every unit that asks for it and leave its weights in ``store``; returns one record per unit.

    ``streamer`` walks the teacher: the base model's weights. ``initial``: the weights that students start from, in
    the plan's order (default: the streamer's, which must be in that order then). ``tokens`` [n, s]. The records are
    those of :meth:`megatron_spd.distill.trainer.UnitTrainer.run`. Memory: the hidden states of ``tokens`` twice
    (teacher and student) and once more behind a unit, and the unit with its optimizer.

    Raises UserError for a loss that is not known, for too little text, and if hidden states are not finite.
    """
    units = units_to_train(plan)
    if settings.loss not in LOSSES:
        raise UserError(f"loss {settings.loss!r} is not known; choose one of {list(LOSSES)}")
    if units:
        settings.check_amount(tokens, streamer.runtime.dp_size)
    # The main rank decides: others may see a shared disk late.
    missing = streamer.runtime.from_main([u for u in units if not store.has(u)])
    if missing:
        finished = [u for u in units if u not in missing]
        _Walk(streamer, plan, tokens, settings, store, tracker, initial or streamer.weights, finished).train(
            missing
        )
    streamer.runtime.barrier()
    return [store.record(u) for u in units]


class _Walk:
    """The way through the blocks with the teacher's stream and the student's."""

    def __init__(
        self,
        teacher: BlockStreamer,
        plan: SPDPlan,
        tokens: Tensor,
        settings: DistillSettings,
        store: UnitStore,
        tracker: Tracker,
        initial: BlockWeights,
        finished: Sequence[range],
    ) -> None:
        self.teacher, self.plan, self.tokens, self.settings = teacher, plan, tokens, settings
        self.store, self.tracker, self.initial, self.runtime = store, tracker, initial, teacher.runtime
        #: Trained blocks whose weights were kept, with their units.
        self.kept: dict[int, range] = {}
        for unit in finished:
            self._note(unit)
        self.student = BlockStreamer(
            teacher.reader, teacher.runtime, teacher.dtype, self._student_weights, teacher.micro_batch
        )
        self.x = teacher.embed(tokens)
        #: The student's own stream; None as long as nothing in front of it is dropped, or if nobody asks for it.
        self.own: list[Tensor] | None = None
        self.block = 0

    def _note(self, unit: range) -> None:
        kept = self.runtime.is_main and self.store.record(unit)["kept"]
        if self.runtime.from_main(kept):
            self.kept |= dict.fromkeys(unit, unit)

    def _student_weights(self, block: int) -> Mapping[str, Tensor]:
        unit = self.kept.get(block)
        return self.initial(block) if unit is None else self.store.block(unit, block)

    def train(self, units: Sequence[range]) -> None:
        """Train ``units``, in order."""
        clock = _Clock(self.settings.max_seconds, len(units))
        fisher = self._fisher(units)
        for unit in units:
            self._go_to(unit.start)
            teacher, own = self.x, self.own or self.x
            x: Sequence[Tensor] = teacher
            for block in unit:
                x = self.teacher.advance(block, x)
            data = self._data(teacher, own, x)
            loss = make_loss(self.settings.loss, fisher.get(unit.stop - 1))
            # What was streamed last makes room for the optimizer.
            self.teacher.release()
            self.student.release()
            trainer = UnitTrainer(
                self.teacher.shape,
                self.plan,
                unit,
                self.initial,
                self.runtime,
                self.settings,
                loss,
                self.tracker,
            )
            record = trainer.run(data, clock.share())
            self.store.save(unit, trainer.full_weights() if record["kept"] else None, record, self.runtime)
            trainer.close()
            # Its files are read by all ranks.
            self.runtime.barrier()
            self._note(unit)
            if unit != units[-1]:
                self._pass_student(unit)
            self.x, self.block = list(x), unit.stop

    def _data(self, teacher: Sequence[Tensor], own: Sequence[Tensor], behind: Sequence[Tensor]) -> UnitData:
        def joined(stream: Sequence[Tensor], wanted: bool) -> Tensor | None:
            return torch.cat(list(stream), 1) if wanted else None

        inputs, judges = self.settings.inputs, self.settings.held_out_count(len(self.tokens))
        # The same stream is not kept twice.
        mixed = inputs == "mixed" and own is not teacher
        return UnitData(
            joined(teacher, mixed or inputs == "teacher"),
            joined(own, inputs != "teacher"),
            torch.cat(list(behind), 1),
            judges,
        )

    def _go_to(self, stop: int) -> None:
        """Advance both streams to the front of block ``stop``."""
        units = {u.start: u for u in self.plan.units()}
        while self.block < stop:
            unit = units.get(self.block, range(self.block, self.block + 1))
            self._pass_student(unit)
            for block in unit:
                self.x = self.teacher.advance(block, self.x)
            self.block = unit.stop

    def _pass_student(self, unit: range) -> None:
        """Advance the student's stream through ``unit`` (or a single stock block) under the plan's schedules."""
        schedules = [self.plan.block_schedule(block) for block in unit]
        if self.settings.inputs == "teacher" or (self.own is None and all(s.is_stock for s in schedules)):
            return
        x: list[Tensor] = self.own or self.x
        pending: list[Tensor | None] = [None] * len(x)
        for block, schedule in zip(unit, schedules, strict=True):
            x, pending = self.student.advance_pending(block, schedule, x, pending)
        self.own = x

    def _fisher(self, units: Sequence[range]) -> dict[int, Tensor]:
        """Channel weights of the units' outputs, by their last blocks, if the loss wants them."""
        if self.settings.loss != "fisher":
            return {}
        training = len(self.tokens) - self.settings.held_out_count(len(self.tokens))
        tokens = self.tokens[: min(training, FISHER_SEQUENCES)]
        return output_fisher(self.teacher, tokens, [u.stop - 1 for u in units], self.settings.seed)


class _Clock:
    """Shares a time budget out over the units that are left."""

    def __init__(self, seconds: float | None, units: int) -> None:
        self._end = None if seconds is None else time.monotonic() + seconds
        self._left = units

    def share(self) -> float | None:
        if self._end is None:
            return None
        seconds = max(0.0, self._end - time.monotonic()) / max(1, self._left)
        self._left -= 1
        return seconds
