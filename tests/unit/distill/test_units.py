"""The mark by which distilled weights know their plan."""

from __future__ import annotations

import pytest

from megatron_spd.distill.units import plan_mark
from megatron_spd.plan import BaseModel, SPDPlan

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
