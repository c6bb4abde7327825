"""What is compared: a plan for every share of dropped points and every collective of the kept ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_spd.checkpoint.hf import CheckpointReader
from megatron_spd.errors import UserError
from megatron_spd.plan import FULL, NONE, SPDPlan

#: The variant that all others are compared with, and the one that no variant can beat.
PLAIN = "plain"
LIMIT = "no communication"


@dataclass(frozen=True)
class Variant:
    """One line of the result. ``silent``: its collectives are left out, whatever its plan says."""

    name: str
    plan: SPDPlan
    silent: bool = False


def make_variants(
    plain: SPDPlan,
    drops: Sequence[str],
    collectives: Sequence[str],
    plans: Sequence[tuple[str, SPDPlan]] = (),
) -> list[Variant]:
    """:data:`PLAIN`, every other pair of ``drops`` and ``collectives``, every pair of ``plans`` and ``collectives``,
    and :data:`LIMIT`.

    ``plain``: the plan that drops nothing. ``drops``: see :func:`drop_points`. ``collectives``: of the kept points, as
    in a plan ("full", "int8"); a given plan with "full" stays as it is. Raises UserError for what is neither.
    """
    schedules = [
        (_drop_name(drop, plain), plain.with_drops(drop_points(drop, plain.num_layers))) for drop in drops
    ]
    found = {PLAIN: plain}
    for name, plan in [*schedules, *plans]:
        for collective in collectives:
            label = " + ".join(part for part in (name, "" if collective == FULL else collective) if part)
            found.setdefault(label or PLAIN, with_collective(plan, collective))
    return [*(Variant(name, plan) for name, plan in found.items()), Variant(LIMIT, plain, silent=True)]


def _drop_name(drop: str, plain: SPDPlan) -> str:
    count = len(drop_points(drop, plain.num_layers))
    if drop == "attention":
        return f"attention ({count}) dropped"
    return f"{count} of {len(plain.sync_points)} dropped" if count else ""


def drop_points(drop: str, num_layers: int) -> list[int]:
    """The sync points that ``drop`` stands for: "none", "attention" (all attention points), a number of points, or a
    share of all 2L as "50%".

    Numbers take attention points first, then MLP points, spread evenly over the blocks: which points are dropped
    matters for accuracy, how many for time. Raises UserError for anything else, and for more points than 2L - 1 (the
    last cannot be dropped).
    """
    if drop in ("none", "attention"):
        return [] if drop == "none" else list(range(0, 2 * num_layers, 2))
    most = 2 * num_layers - 1
    try:
        count = round(float(drop[:-1]) / 100 * 2 * num_layers) if drop.endswith("%") else int(drop)
    except (ValueError, OverflowError):
        count = -1
    if not 0 <= count <= most:
        raise UserError(
            f"--drops has {drop!r}; expected none, attention, a number of points from 0 to {most}, or a share like 50%"
        )
    attention = _spread(min(count, num_layers), num_layers)
    mlp = _spread(max(count - num_layers, 0), num_layers - 1)
    return sorted([2 * block for block in attention] + [2 * block + 1 for block in mlp])


def _spread(count: int, total: int) -> list[int]:
    """``count`` of the numbers 0..total-1, evenly spaced."""
    return [i * total // count for i in range(count)]


def with_collective(plan: SPDPlan, collective: str) -> SPDPlan:
    """``plan`` with ``collective`` at every kept point that has a full all-reduce. Raises PlanError for an unknown
    collective."""
    changed = [collective if c == FULL else c for c in plan.sync_points]
    if collective == NONE:
        raise UserError("--collectives has 'none'; points are left out by --drops")
    made = dataclasses.replace(plan, sync_points=changed)
    made.validate()
    return made


def read_plans(paths: Sequence[str], model: CheckpointReader) -> list[tuple[str, SPDPlan]]:
    """Plans by name from plan files or SPD exports, checked against the shape of ``model``.

    Raises UserError for a plan of another shape and for a folder that is no export.
    """
    found = []
    for path in paths:
        plan = CheckpointReader(path).plan if Path(path).is_dir() else SPDPlan.load(path)
        if plan is None:
            raise UserError(f"{path} is a plain model; give a plan or an SPD export")
        base, shape = plan.base_model, model.base_model()
        if dataclasses.replace(base, fingerprint="", model_type="") != dataclasses.replace(
            shape, fingerprint="", model_type=""
        ):
            raise UserError(f"the plan in {path} is for a model of another shape than {model.folder}")
        found.append((Path(path).stem, plan))
    return found
