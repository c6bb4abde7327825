"""Calibrated units on demand, for everything that measures candidates: the sweep and the schedule search.

A unit is named by its dropped points. It is calibrated when it is first asked for, on dense hidden states that are
kept for every block (this rank's sequences only), and its weights are kept as this rank's shard, the least recently
used ones only up to a limit.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

from torch import Tensor

from megatron_spd.calibration.stream import BlockStreamer, BlockVariant
from megatron_spd.grouping.calibrate import UnitCalibrator
from megatron_spd.grouping.sample import Sample
from megatron_spd.grouping.walk import DenseStates
from megatron_spd.models.weights import shard_block
from megatron_spd.plan import SPDPlan
from megatron_spd.progress import progress_bar

#: Bytes of calibrated weights that a rank keeps. A unit that was let go is calibrated again, with the same result.
CACHE_BYTES = 4 * 2**30


class CalibratedUnits:
    """``UnitVariants`` (see ``calibration/stream.py``) with calibrated weights. Calls are collectives."""

    def __init__(
        self,
        streamer: BlockStreamer,
        calibrator: UnitCalibrator,
        dense: SPDPlan,
        tokens: Tensor,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        """``dense``: the plan that drops nothing. ``streamer`` walks the base model over ``tokens`` [n, s]."""
        self._calibrator, self._dense, self._limit = calibrator, dense, cache_bytes
        self._runtime, self._family = streamer.runtime, streamer.shape.family
        self._kept: OrderedDict[tuple[int, ...], Mapping[int, BlockVariant]] = OrderedDict()
        self._bytes = 0
        states = DenseStates(streamer, tokens)
        self._samples: list[Sample] = []
        with progress_bar(streamer.runtime, "hidden states", dense.num_layers, "block") as bar:
            for block in range(dense.num_layers):
                self._samples.append(states.in_front_of(block))
                bar.update()

    def __call__(self, points: tuple[int, ...]) -> Mapping[int, BlockVariant]:
        """The blocks of the unit with the dropped ``points``. Raises ValueError if they make more than one unit."""
        if points in self._kept:
            self._kept.move_to_end(points)
            return self._kept[points]
        variants = self._calibrate(points)
        self._kept[points] = variants
        self._bytes += _bytes(variants)
        while self._bytes > self._limit and len(self._kept) > 1:
            _, oldest = self._kept.popitem(last=False)
            self._bytes -= _bytes(oldest)
        return variants

    def _calibrate(self, points: tuple[int, ...]) -> Mapping[int, BlockVariant]:
        plan = self._dense.with_drops(points)
        units = plan.units()
        if len(units) != 1:
            raise ValueError(f"points {points} make {len(units)} units; expected one")
        (unit,) = units
        schedules = [plan.block_schedule(i) for i in unit]
        results = self._calibrator.calibrate(unit, schedules, self._samples[unit.start])
        variants = {}
        for block, result in results.items():
            schedule = plan.with_block(block, **result.changes).block_schedule(block)
            rank, ranks = self._runtime.tp_rank, self._runtime.tp_size
            shard = shard_block(result.weights, self._family, rank, ranks)
            # Copies: a view would keep the whole tensor alive.
            variants[block] = BlockVariant(schedule, {n: t.clone() for n, t in shard.items()})
        return variants


def _bytes(variants: Mapping[int, BlockVariant]) -> int:
    return sum(t.nbytes for v in variants.values() for t in (v.own or {}).values())
