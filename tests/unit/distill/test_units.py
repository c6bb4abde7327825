"""The mark by which distilled weights know their plan, and where trained blocks are found."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_spd.distill.units import FinishStore, UnitStore, plan_mark, trained_block
from megatron_spd.errors import UserError
from megatron_spd.plan import BaseModel, SPDPlan
from megatron_spd.runtime.distributed import initialize

PLAN = SPDPlan.dense(BaseModel("f", "llama", 3, 24, 6, 3, 12), 3).with_drops([2, 3])


@pytest.mark.parametrize(
    "change",
    [
        {"kv_group_order": [1, 0, 2]},
        {"neuron_order": [*range(1, 12), 0]},
        *({flag: True} for flag in ("attention_shift", "mlp_shift", "attention_norm", "mlp_norm")),
    ],
    ids=lambda change: next(iter(change)),
)
def test_whatever_changes_the_function_changes_the_mark(change: dict) -> None:
    assert plan_mark(PLAN.with_block(1, **change)) != plan_mark(PLAN)


def test_dropped_points_change_the_mark() -> None:
    assert plan_mark(PLAN.with_drops([2])) != plan_mark(PLAN)


def test_what_is_said_about_a_plan_does_not() -> None:
    same = PLAN.with_block(1, tier="SB", recovery="b2b").with_provenance(seed=1)
    assert plan_mark(same) == plan_mark(PLAN)


def block(value: float) -> dict[str, Tensor]:
    return {"mlp.down_proj.weight": torch.full((2, 3), value)}


def value_of(found: dict[str, Tensor] | None) -> float | None:
    return None if found is None else float(found["mlp.down_proj.weight"][0, 0])


def test_the_last_training_of_a_block_wins(tmp_path: Path) -> None:
    runtime = initialize()
    units = UnitStore(tmp_path / "distill", "mark", runtime)
    units.save(range(0, 2), {0: block(1.0), 1: block(2.0)}, {"kept": True}, runtime)
    units.save(range(3, 4), None, {"kept": False}, runtime)
    finished = FinishStore(tmp_path / "finish", "mark", runtime)
    finished.save_block(1, block(5.0), runtime)
    finished.save_block(2, block(6.0), runtime)
    folders = [tmp_path / "finish", tmp_path / "distill"]
    # Without its record, a pass is not over and does not count.
    assert [value_of(trained_block(folders, i)) for i in range(4)] == [1.0, 2.0, None, None]
    finished.save_record({"kept": True}, runtime)
    assert [value_of(trained_block(folders, i)) for i in range(4)] == [1.0, 5.0, 6.0, None]
    assert value_of(trained_block([tmp_path / "distill", tmp_path / "nowhere"], 1)) == 2.0
    assert value_of(units.block(range(0, 2), 1)) == 2.0


def test_a_folder_of_another_training_is_refused(tmp_path: Path) -> None:
    runtime = initialize()
    FinishStore(tmp_path / "finish", "one", runtime)
    assert FinishStore(tmp_path / "finish", "one", runtime).record() is None
    with pytest.raises(UserError, match="holds the units of another distillation"):
        FinishStore(tmp_path / "finish", "other", runtime)
