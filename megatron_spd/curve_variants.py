"""What a curve compares: for every variant the plan and the weights that some dropped points get.

``zero-shot`` nothing; ``shift``, ``neurons`` and ``all``: calibrated with these ingredients, each kept by the guard of
``grouping/calibrate.py``; ``heads``: the paper's head grouping as published, without a guard; ``b2b``: ``all``, then
distilled; ``finish``: then the last pass on logits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_spd import stages
from megatron_spd.calibration.stream import BlockStreamer, BlockVariant, BlockWeights
from megatron_spd.checkpoint.hf import CheckpointReader
from megatron_spd.compensation import (
    calibrate_into,
    calibrated_units,
    calibration_identity,
    chosen_ingredients,
)
from megatron_spd.config import CurveOptions
from megatron_spd.distill.tracking import Tracker
from megatron_spd.evaluate.perplexity import plan_nll
from megatron_spd.grouping.calibrate import Ingredients
from megatron_spd.grouping.permute import planned_weights
from megatron_spd.grouping.provider import CalibratedUnits
from megatron_spd.options import TrainingOptions
from megatron_spd.plan import BRANCH_FLAGS, SPDPlan
from megatron_spd.run_folder import RunFolder
from megatron_spd.runtime.distributed import Runtime
from megatron_spd.stages import TrainingText

#: The variants whose blocks are calibrated as they are measured; sets are chosen with the first.
CALIBRATED = ("all", "shift", "neurons")
TRAINED = ("b2b", "finish")


class Variants:
    """The variants of one model. Calls are collectives.

    ``calibration`` and ``scoring``: pieces [n, s] to calibrate on and to measure losses on; ``training``: to train on.
    What takes long is kept in ``folder``: stages, and the blocks of each ratio in a folder of its own.
    """

    def __init__(
        self,
        reader: CheckpointReader,
        runtime: Runtime,
        options: CurveOptions,
        folder: RunFolder,
        calibration: Tensor,
        training: TrainingText,
        scoring: Tensor,
    ) -> None:
        self.reader, self.runtime, self.options, self.folder = reader, runtime, options, folder
        self.calibration, self.training, self.scoring = calibration, training, scoring
        self.dense = SPDPlan.dense(reader.base_model(), options.branches)
        self._units: tuple[str, CalibratedUnits] | None = None

    def streamer(self) -> BlockStreamer:
        """A streamer over the base model's weights."""
        return stages.make_streamer(self.reader, self.runtime, dtype=self.options.dtype)

    def losses(self, variant: str, ratio: float, plan: SPDPlan) -> list[float]:
        """Sum of -log p, in nats, of every scored sequence under ``variant`` with the drops of ``plan``."""
        if variant in CALIBRATED:
            units = self.calibrated(variant)
            return plan_nll(self.streamer(), plan, self.scoring, f"{variant} {ratio:g}", units).tolist()
        return self.plan_losses(*self.model(variant, ratio, plan))

    def plan_losses(self, plan: SPDPlan, weights: BlockWeights | None = None) -> list[float]:
        """The same of a plan with ``weights`` in its order (default: the base model's own)."""
        streamer = self.streamer()
        streamer.weights = weights or streamer.weights
        return plan_nll(streamer, plan, self.scoring).tolist()

    def model(self, variant: str, ratio: float, plan: SPDPlan) -> tuple[SPDPlan, BlockWeights]:
        """The plan and the weights of a cell, in the plan's order. Calibrated ones are whole on one rank only."""
        if variant == "zero-shot":
            return plan, self.reader.block
        if variant == "heads":
            plan = self._with_published_heads(plan)
            return plan, planned_weights(self.reader, plan)
        if variant in CALIBRATED:
            return self._calibrated_model(variant, plan)
        folder = self.folder.folder / f"{ratio:g}"
        plan = self._grouped(plan, folder)
        folders = [folder / "distill", folder / "calibrated"]
        self._train(plan, folder, "none")
        if variant == "finish":
            self._train(plan, folder, self.options.finish)
            folders.insert(0, stages.finish_folder(folders[0]))
        return plan, stages.trained_weights(folders, planned_weights(self.reader, plan))

    def _with_published_heads(self, plan: SPDPlan) -> SPDPlan:
        """The paper's head grouping wherever the attention point is dropped; no guard, as published."""

        def group() -> dict[str, Any]:
            wanted = self.dense
            for block in range(wanted.num_layers):
                wanted = wanted.with_block(block, recovery="hg+b2b")
            return stages.group_plan(self.streamer(), wanted, self.calibration).to_dict()

        grouped = SPDPlan.from_dict(self.folder.stage("published heads", group))
        for block in range(plan.num_layers):
            if plan.block_schedule(block).drop_attention:
                plan = plan.with_block(block, kv_group_order=grouped.blocks[block].kv_group_order)
        return plan

    # ---- calibrated blocks ------------------------------------------------------------------------------------

    def _ingredients(self, variant: str) -> Ingredients:
        if variant == "all":
            return chosen_ingredients(self.options)
        return Ingredients("none", variant == "neurons", variant == "shift", norm=False, refit=False)

    def calibrated(self, variant: str) -> CalibratedUnits:
        """Units of ``variant``; those of the last one asked for are kept."""
        if self._units is None or self._units[0] != variant:
            self._units = None  # two at a time would be too much memory
            units = calibrated_units(
                self.streamer(), self.options.branches, self.calibration, self._ingredients(variant)
            )
            self._units = (variant, units)
        return self._units[1]

    def grouping(self, variant: str) -> str:
        """What decides the calibrated weights."""
        return calibration_identity(self.dense, self.calibration, self._ingredients(variant))

    def _calibrated_model(self, variant: str, plan: SPDPlan) -> tuple[SPDPlan, BlockWeights]:
        """Orders are in the weights already and so not in the plan."""
        units = self.calibrated(variant)
        blocks: dict[int, BlockVariant] = {}
        for unit in plan.units():
            blocks |= units(plan.points_in(unit))
        for block, found in blocks.items():
            plan = plan.with_block(block, **{name: getattr(found.schedule, name) for name in BRANCH_FLAGS})

        def weights(block: int) -> Mapping[str, Tensor]:
            own = blocks[block].own if block in blocks else None
            return self.reader.block(block) if own is None else own

        return plan, weights

    # ---- trained blocks ---------------------------------------------------------------------------------------

    def _grouped(self, plan: SPDPlan, folder: Path) -> SPDPlan:
        """The plan with its orders, shifts and norms; its calibrated blocks are in ``folder`` then."""

        def group() -> dict[str, Any]:
            self._units = None  # training needs the memory
            ingredients = chosen_ingredients(self.options)
            grouped, _ = calibrate_into(
                self.streamer(), plan, self.calibration, ingredients, folder / "calibrated"
            )
            return grouped.to_dict()

        return SPDPlan.from_dict(self.folder.stage(f"calibration {folder.name}", group))

    def _train(self, plan: SPDPlan, folder: Path, finish: str) -> None:
        """Distil the calibrated blocks in ``folder``, or make the last pass on the distilled ones unless ``finish`` is
        "none". What is there already is not trained again."""
        name = "distillation" if finish == "none" else "last pass"
        self.folder.stage(f"{name} {folder.name}", lambda: self._training_records(plan, folder, finish))

    def _training_records(self, plan: SPDPlan, folder: Path, finish: str) -> list[Any]:
        names = [field.name for field in dataclasses.fields(TrainingOptions)]
        given = {name: getattr(self.options, name) for name in names}
        options = TrainingOptions(**given | {"finish": finish})
        stores = stages.training_stores(options, plan, self.training, folder, self.runtime, "calibrated")
        # Half of the minutes for each of the two trainings.
        seconds = None if options.max_minutes is None else options.max_minutes * 30
        with Tracker(options.tracking, folder, self.runtime.is_main) as tracker:
            records = stages.run_training(
                self.reader,
                self.runtime,
                plan,
                self.training,
                options,
                stores,
                tracker,
                seconds,
                stages.final_weights(self.reader, plan, calibrated=folder / "calibrated"),
            )
        return list(records)
