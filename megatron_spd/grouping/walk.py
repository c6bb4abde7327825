"""Calibration of a whole plan, unit after unit, on the dense model's hidden states."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron_spd.calibration.stream import BlockStreamer
from megatron_spd.errors import UserError
from megatron_spd.grouping.calibrate import BlockResult, UnitCalibrator
from megatron_spd.grouping.sample import Sample
from megatron_spd.plan import SPDPlan
from megatron_spd.progress import progress_bar
from megatron_spd.runtime.distributed import Runtime

#: Share of the sequences that judge and are not fitted on.
HELD_OUT = 0.25

#: What happens to a finished unit's results.
Save = Callable[[range, dict[int, BlockResult]], None]


def calibrate_plan(
    streamer: BlockStreamer,
    calibrator: UnitCalibrator,
    plan: SPDPlan,
    tokens: Tensor,
    units: Sequence[range],
    save: Save,
) -> None:
    """Calibrate ``units`` (some of ``plan.units()``, ascending) and hand each result to ``save``.

    ``streamer`` walks the base model; ``tokens`` [n, s]: the last quarter of the sequences judges, and every rank
    takes its own share of the rest. Raises UserError for fewer than two sequences.
    """
    if not units:
        return
    states = DenseStates(streamer, tokens)
    with progress_bar(streamer.runtime, "calibrate", units[-1].stop, "block") as bar:
        for unit in units:
            sample = states.in_front_of(unit.start, bar.update)
            save(unit, calibrator.calibrate(unit, [plan.block_schedule(i) for i in unit], sample))
        bar.update(units[-1].stop - states.block)


def held_out_count(sequences: int) -> int:
    """How many of ``sequences`` judge."""
    return max(1, round(sequences * HELD_OUT))


class DenseStates:
    """The dense model's hidden states of the calibration text, moved forward block by block."""

    def __init__(self, streamer: BlockStreamer, tokens: Tensor) -> None:
        if len(tokens) < 2:
            raise UserError(
                f"calibration was given {len(tokens)} sequence; it needs at least 2 (one of them judges)"
            )
        held_out = held_out_count(len(tokens))
        self.streamer, self.block = streamer, 0
        self._fit, self._judge = streamer.embed(tokens[:-held_out]), streamer.embed(tokens[-held_out:])

    def in_front_of(self, block: int, on_block: Callable[[int], object] = lambda n: None) -> Sample:
        """This rank's sample in front of ``block``, which must not lie behind; ``on_block(1)`` after every block."""
        if block < self.block:
            raise ValueError(f"the states stand in front of block {self.block}, block {block} is behind them")
        while self.block < block:
            self._fit = self.streamer.advance(self.block, self._fit)
            self._judge = self.streamer.advance(self.block, self._judge)
            self.block += 1
            on_block(1)
        return Sample.of(_own(self._fit, self.streamer.runtime), _own(self._judge, self.streamer.runtime))


def _own(stream: Sequence[Tensor], runtime: Runtime) -> list[Tensor]:
    """This rank's sequences of a stream that all ranks hold, in float32: every world-size-th."""
    own, first = [], 0
    for x in stream:
        mine = (torch.arange(x.shape[1]) + first) % runtime.world_size == runtime.rank
        first += x.shape[1]
        if bool(mine.any()):
            own.append(x[:, mine.to(x.device)].float())
    return own
