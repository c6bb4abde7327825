"""Stages around calibration: grouped units of a plan on disk, sensitivities and sets measured with grouping on.

Called by the commands and by ``run`` on all ranks, like ``stages.py``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_spd.calibration.stream import BlockStreamer, UnitVariants, plain_variants
from megatron_spd.checkpoint.hf import CheckpointReader
from megatron_spd.distill.units import UnitStore, plan_mark
from megatron_spd.errors import UserError
from megatron_spd.grouping.calibrate import BlockResult, Ingredients, UnitCalibrator
from megatron_spd.grouping.formulas import AttentionSettings
from megatron_spd.grouping.provider import CalibratedUnits
from megatron_spd.grouping.walk import calibrate_plan
from megatron_spd.options import INGREDIENTS, GroupingOptions
from megatron_spd.plan import BlockPlan, SPDPlan
from megatron_spd.runtime.distributed import Runtime
from megatron_spd.stages import calibration_tokens


def make_calibrator(streamer: BlockStreamer, branches: int, ingredients: Ingredients) -> UnitCalibrator:
    """A calibrator of the model that ``streamer`` walks."""
    reader = streamer.reader
    settings = AttentionSettings.of(streamer.shape)
    return UnitCalibrator(
        reader.block, reader.family, reader.base_model(), settings, branches, streamer.runtime, ingredients
    )


def calibrated_units(
    streamer: BlockStreamer, branches: int, tokens: Tensor, ingredients: Ingredients
) -> CalibratedUnits:
    """Units for the sweep and the search, calibrated on ``tokens`` [n, s] as they are asked for."""
    dense = SPDPlan.dense(streamer.reader.base_model(), branches)
    return CalibratedUnits(streamer, make_calibrator(streamer, branches, ingredients), dense, tokens)


def chosen_ingredients(options: GroupingOptions) -> Ingredients:
    """What ``--ingredients`` allows."""
    names = options.ingredient_names
    flags = {name: name in names for name in INGREDIENTS if name != "heads"}
    return Ingredients(heads="joint" if "heads" in names else "none", **flags)


def calibration_pieces(reader: CheckpointReader, options: GroupingOptions) -> Tensor:
    """The pieces of ``--data`` to calibrate on: behind those that sensitivity and sets are measured on."""
    return calibration_tokens(reader, options, options.calibration_sequences, options.sequences)


def measured_variants(
    streamer: BlockStreamer, branches: int, options: GroupingOptions, grouped: bool
) -> tuple[UnitVariants, str]:
    """What candidates are measured with, and a text that tells it apart: the model's own weights, or calibrated units
    where ``grouped``."""
    if not grouped:
        return plain_variants(branches, streamer.num_layers), ""
    tokens, ingredients = calibration_pieces(streamer.reader, options), chosen_ingredients(options)
    dense = SPDPlan.dense(streamer.reader.base_model(), branches)
    return (
        calibrated_units(streamer, branches, tokens, ingredients),
        calibration_identity(dense, tokens, ingredients),
    )


def calibration_identity(plan: SPDPlan, tokens: Tensor, ingredients: Ingredients) -> str:
    """What decides a calibration's weights: the plan's own mark, and a hash of the rest."""
    facts = json.dumps(dataclasses.asdict(ingredients), sort_keys=True).encode()
    return f"{plan_mark(plan)} {hashlib.sha256(facts + tokens.numpy().tobytes()).hexdigest()}"


def calibrate_into(
    streamer: BlockStreamer, plan: SPDPlan, tokens: Tensor, ingredients: Ingredients, folder: Path
) -> tuple[SPDPlan, list[dict[str, Any]]]:
    """Calibrate the units of ``plan`` that ``folder`` lacks; returns the plan with their orders, shifts and norms, and
    a record for each calibrated block: ``block``, ``errors`` of all candidates, what was ``kept``.

    ``streamer`` walks the base model in its original order. A killed calibration goes on with its first missing unit.
    Raises UserError for a plan that has orders, shifts or norms already, and for a folder of another calibration.
    """
    runtime = streamer.runtime
    if plan != _bare(plan):
        raise UserError(
            "the plan has grouped heads or neurons, shifts or branch norms already, and calibration finds its own; "
            "give the plan that `megatron-spd plan` wrote"
        )
    store = UnitStore(folder, calibration_identity(plan, tokens, ingredients), runtime)
    units = plan.units()
    missing = runtime.from_main([u for u in units if not store.has(u)])
    calibrator = make_calibrator(streamer, plan.branches, ingredients)

    def save(unit: range, results: dict[int, BlockResult]) -> None:
        weights = {block: _stored(streamer.reader, r) for block, r in results.items()}
        record = {str(block): {"changes": r.changes, **r.record} for block, r in results.items()}
        store.save(unit, weights, record, runtime)

    calibrate_plan(streamer, calibrator, plan, tokens, missing, save)
    runtime.barrier()
    return _with_changes(plan, units, store, runtime)


def _stored(reader: CheckpointReader, result: BlockResult) -> dict[str, Tensor]:
    """A block's tensors in the checkpoint's own type, as the export will hold them."""
    dtype = reader.dtype(reader.family.final_norm)
    return {name: t.to("cpu", dtype) for name, t in result.weights.items()}


def _with_changes(
    plan: SPDPlan, units: Sequence[range], store: UnitStore, runtime: Runtime
) -> tuple[SPDPlan, list[dict[str, Any]]]:
    held = runtime.from_main([store.record(u) for u in units] if runtime.is_main else None)
    records = []
    for record in held:
        for block, entry in record.items():
            plan = plan.with_block(int(block), **entry.pop("changes"))
            records.append({"block": int(block), **entry})
    return plan, records


def _bare(plan: SPDPlan) -> SPDPlan:
    """The plan without what calibration decides."""
    blocks = [BlockPlan(tier=b.tier, recovery=b.recovery) for b in plan.blocks]
    return dataclasses.replace(plan, blocks=blocks)


def check_calibrated_for(plan: SPDPlan, folder: Path) -> Path:
    """``folder`` again. Raises UserError unless it holds the calibrated units of ``plan``."""
    stamp = folder / "identity"
    if not stamp.is_file():
        raise UserError(f"{folder} is not a folder of `megatron-spd group --calibrated`; give that folder")
    if not stamp.read_text(encoding="utf-8").startswith(plan_mark(_bare(plan))):
        raise UserError(
            f"the blocks in {folder} were calibrated for another plan (other sync points, branches or model); give "
            "the plan that `megatron-spd group` wrote with them"
        )
    for unit in plan.units():
        path = folder / f"unit_{unit.start:04d}_{unit.stop - 1:04d}.json"
        held = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        for block in unit:
            changes = held.get(str(block), {}).get("changes")
            if changes is None or plan.with_block(block, **changes) != plan:
                raise UserError(
                    f"the blocks in {folder} were calibrated for another plan (block {block} differs); give the plan "
                    "that `megatron-spd group` wrote with them"
                )
    return folder
