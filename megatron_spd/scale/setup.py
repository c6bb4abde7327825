"""One run on paper: a model's sizes, how it is split, and how much text every stage sees."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from megatron_spd.calibration.stream import CPU_TOKENS
from megatron_spd.config import DryRunOptions
from megatron_spd.distill.settings import TrainingSettings
from megatron_spd.errors import UserError
from megatron_spd.grouping.walk import held_out_count
from megatron_spd.models.build import DTYPES
from megatron_spd.plan import SPDPlan
from megatron_spd.planning import DEFAULT_RATIO
from megatron_spd.scale.hardware import HARDWARE, Hardware
from megatron_spd.scale.size import ModelSize, model_size
from megatron_spd.sensitivity.tiers import drop_count, droppable_points, sync_points
from megatron_spd.stages import distill_settings, finish_settings

#: Sequences that a streamer computes at a time (``stages.make_streamer``).
_STREAM_BATCH = 8


@dataclass(frozen=True)
class Setup:
    """What ``megatron-spd run`` would do with ``options`` for a model of ``size``. Raises UserError where it would."""

    options: DryRunOptions
    size: ModelSize

    @classmethod
    def of(cls, options: DryRunOptions) -> Setup:
        """Of the model that ``options.config`` names."""
        setup = cls(options, model_size(options.config))
        base = setup.size.base_model()
        base.check_branches(setup.branches)
        if options.ranks % options.nodes:
            raise UserError(
                f"--nodes {options.nodes} do not divide --ranks {options.ranks}, which counts the ranks of all nodes"
            )
        if options.ranks % setup.ranks:
            raise UserError(
                f"M = {setup.ranks} tensor-parallel ranks do not divide the {options.ranks} ranks of all nodes"
            )
        SPDPlan.dense(base, setup.branches).check_ranks(setup.ranks)
        return setup

    # ---- how it is split --------------------------------------------------------------------------------------

    @property
    def branches(self) -> int:
        """G."""
        return self.options.branches

    @property
    def ranks(self) -> int:
        """M."""
        return self.options.tensor_parallel or self.options.ranks

    @property
    def world(self) -> int:
        return self.options.ranks

    @property
    def replicas(self) -> int:
        return self.world // self.ranks

    @property
    def local_branches(self) -> int:
        """B, of one rank."""
        return self.branches // self.ranks

    @property
    def itemsize(self) -> int:
        """Bytes of a weight or an activation while computing."""
        return DTYPES[self.options.dtype].itemsize

    @property
    def hardware(self) -> Hardware:
        return HARDWARE[self.options.hardware]

    # ---- text -------------------------------------------------------------------------------------------------

    @property
    def length(self) -> int:
        """Tokens of a piece."""
        return self.options.seq_length

    @property
    def measured_tokens(self) -> int:
        """Of the sensitivity sweep and the search."""
        return self.options.sequences * self.length

    @property
    def calibration_tokens(self) -> int:
        return self.options.calibration_sequences * self.length

    @property
    def own_calibration_tokens(self) -> int:
        """Of one rank: calibration is data parallel."""
        pieces = self.options.calibration_sequences
        judges = held_out_count(pieces)
        return (-(-judges // self.world) + -(-(pieces - judges) // self.world)) * self.length

    @property
    def distill_tokens(self) -> int:
        return self.options.distill_sequences * self.length

    @property
    def finish_tokens(self) -> int:
        """Of the finishing pass's text."""
        return (self.options.finish_sequences or self.options.distill_sequences) * self.length

    @property
    def streamed_together(self) -> int:
        """Tokens that a streamer computes at a time in the sweep, the search and calibration."""
        together = _STREAM_BATCH
        if self.hardware.is_cpu:
            together = min(together, max(1, CPU_TOKENS // self.length))
        return min(together, self.options.sequences) * self.length

    @property
    def micro_batch(self) -> int:
        """Tokens of a micro-batch in training."""
        return self.training.batching()[0] * self.length

    # ---- what is done -----------------------------------------------------------------------------------------

    @property
    def stages(self) -> list[str]:
        """The stages that ``run`` goes through, in order."""
        asked = {
            "search": self.options.sets_to_measure,
            "calibration": self.options.grouped,
            "distillation": self.trains,
            "finishing": self.finishing is not None,
        }
        return ["sensitivity", *(stage for stage, wanted in asked.items() if wanted), "export"]

    @cached_property
    def training(self) -> TrainingSettings:
        return distill_settings(self.options, None)

    @cached_property
    def finishing(self) -> TrainingSettings | None:
        """None where there is no finishing pass."""
        return finish_settings(self.options, None) if self.trains else None

    @property
    def trains(self) -> bool:
        return self.options.recovery in ("paper", "full")

    @property
    def droppable(self) -> int:
        return len(droppable_points(self.size.layers, self.options.sync_points))

    @property
    def dropped(self) -> int:
        """Points that are dropped; where measuring decides that, :data:`DEFAULT_RATIO` of them."""
        if self.options.drop_count is not None:
            return min(self.options.drop_count, self.droppable)
        ratio = self.options.drop_ratio
        return drop_count(self.droppable, DEFAULT_RATIO if ratio is None else ratio)

    @property
    def low_bit_candidates(self) -> int:
        return len(self.options.formats) * len(sync_points(self.size.layers, self.options.sync_points))

    @property
    def unit_blocks(self) -> int:
        """Blocks of a unit: one, or the two on both sides of a dropped MLP point."""
        return 1 if self.options.sync_points == "attention" else min(2, self.size.layers)

    @property
    def units(self) -> int:
        """Units, if drops are spread evenly."""
        return min(self.dropped, self.size.layers // self.unit_blocks)

    def candidate_starts(self) -> list[int]:
        """The first block of every stream of the sweep but the plain one."""
        points = droppable_points(self.size.layers, self.options.sync_points)
        kept = sync_points(self.size.layers, self.options.sync_points) * len(self.options.formats)
        return [p // 2 for p in (*points, *kept)]

    # ---- links ------------------------------------------------------------------------------------------------

    @property
    def tensor_parallel_rate(self) -> float:
        """Bytes per second of an all-reduce among the M ranks of a replica."""
        return self._rate(spans_nodes=self.ranks > self.world // self.options.nodes)

    @property
    def data_parallel_rate(self) -> float:
        """Bytes per second of an all-reduce among replicas."""
        return self._rate(spans_nodes=self.options.nodes > 1)

    def _rate(self, spans_nodes: bool) -> float:
        return (self.options.node_rate if spans_nodes else self.hardware.link) * 1e9
