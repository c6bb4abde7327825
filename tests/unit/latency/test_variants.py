"""Which plans are compared, and under which names."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_spd.checkpoint.hf import CheckpointReader
from megatron_spd.errors import UserError
from megatron_spd.latency.variants import LIMIT, PLAIN, drop_points, make_variants, read_plans
from megatron_spd.plan import BaseModel, SPDPlan
from tests.models import make_export, make_llama

BLOCKS = 30
PLAN = SPDPlan.dense(BaseModel("f", "llama", BLOCKS, 576, 9, 3, 1536), 3)


@pytest.mark.parametrize(
    ("drop", "attention", "mlp"),
    [
        *(("none", 0, 0), ("0", 0, 0), ("attention", 30, 0), ("15", 15, 0), ("30", 30, 0), ("45", 30, 15)),
        *(("59", 30, 29), ("25%", 15, 0), ("50%", 30, 0), ("75%", 30, 15)),
    ],
)
def test_drop_points(drop: str, attention: int, mlp: int) -> None:
    points = drop_points(drop, BLOCKS)
    assert points == sorted(set(points))
    assert sum(p % 2 == 0 for p in points) == attention
    assert sum(p % 2 == 1 for p in points) == mlp
    assert PLAN.with_drops(points).dropped == points  # the last point is not among them


def test_numbers_spread_evenly() -> None:
    assert drop_points("3", 6) == [0, 4, 8]


@pytest.mark.parametrize("drop", ["60", "-1", "all", "1.5", "101%", "inf%", "%", ""])
def test_drops_that_are_none(drop: str) -> None:
    with pytest.raises(UserError, match="--drops has"):
        drop_points(drop, BLOCKS)


def test_plain_comes_first_and_the_limit_last() -> None:
    variants = make_variants(PLAN, ["none", "attention", "45"], ["full"])
    assert [v.name for v in variants] == [PLAIN, "attention (30) dropped", "45 of 60 dropped", LIMIT]
    assert [v.silent for v in variants] == [False, False, False, True]
    assert [v.plan.collectives_per_forward() for v in variants] == [60, 30, 15, 60]
    # Plain is compared with even where nobody asks for it.
    assert [v.name for v in make_variants(PLAN, ["15"], ["full"])] == [PLAIN, "15 of 60 dropped", LIMIT]


@pytest.mark.parametrize("collective", ["none", "int99", "half"])
def test_collectives_that_a_kept_point_cannot_have(collective: str) -> None:
    with pytest.raises(UserError):
        make_variants(PLAN, ["none"], [collective])


def test_plans_and_exports_of_the_same_shape(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "m")
    export = make_export(base, tmp_path / "x", 2, [0, 3])
    reader = CheckpointReader(base)
    SPDPlan.dense(reader.base_model(), 2).with_drops([2]).save(tmp_path / "own.json")
    found = read_plans([str(export), str(tmp_path / "own.json")], reader)
    assert [(name, plan.dropped) for name, plan in found] == [("x", [0, 3]), ("own", [2])]

    with pytest.raises(UserError, match="plain model"):
        read_plans([str(base)], reader)
    PLAN.save(tmp_path / "other.json")
    with pytest.raises(UserError, match="another shape"):
        read_plans([str(tmp_path / "other.json")], reader)
