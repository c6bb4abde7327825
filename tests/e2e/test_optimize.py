"""From the sensitivity of low-bit collectives to an export with the cheapest plan, through the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_spd.checkpoint.hf import CheckpointReader
from megatron_spd.plan import SPDPlan
from megatron_spd.stages import traffic
from tests.command_line import answer, command
from tests.e2e.bad_input import assert_one_line
from tests.e2e.full_run import BRANCHES, CALIBRATION, LAYERS, data, make_world

FORMATS = "int8,int3"
LIMIT = 4.0
#: 60 MB/s: a full all-reduce of the tiny model's messages takes long enough to be worth two calls.
LATENCY = ["--optimize", "latency", "--link-rate", 0.5, "--call-latency", 0.01, "--prompt-tokens", 512]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained model, a text, and sensitivities: ``zs.json``, and ``grouped.json`` with calibration."""
    folder = make_world(tmp_path_factory.mktemp("world"))
    for name, more in (("zs", []), ("grouped", ["--grouped"])):
        measured = answer(
            *["sensitivity", *common(folder), "--collectives", "int8:g128,int3", "--method", "single", *more],
            *["--out", folder / f"{name}.json"],
        )
        assert measured["measure"] == "kl"
        assert len(measured["low_bit"]) == 2 * 2 * LAYERS
    return folder


def common(world: Path) -> list[object]:
    model = ["--model", world / "model", "--branches", BRANCHES]
    return [*model, *data(world), "--calibration-sequences", CALIBRATION]


def plan_arguments(world: Path, out: Path, recovery: str, *more: object) -> list[object]:
    measured = ["--sensitivity", world / f"{recovery}.json", "--recovery", recovery, "--out", out]
    chosen = ["--collectives", FORMATS, "--max-perplexity-increase", f"{LIMIT}%", "--search-budget", 8]
    return ["plan", *common(world), *measured, *chosen, *more]


def exported(world: Path, plan: Path, recovery: str, folder: Path) -> Path:
    """The export of ``plan``, calibrated where ``recovery`` says so."""
    calibrated: list[object] = []
    if recovery == "grouped":
        calibrated = ["--calibrated", folder / "calibrated"]
        grouped = folder / "grouped_plan.json"
        same = ["--model", world / "model", *data(world), "--calibration-sequences", CALIBRATION]
        answer("group", *same, "--plan", plan, *calibrated, "--out", grouped)
        plan = grouped
    out = folder / "export"
    answer("export", "--model", world / "model", "--plan", plan, *calibrated, "--out", out)
    return out


@pytest.mark.parametrize("objective", ["bytes", "latency"])
@pytest.mark.parametrize("recovery", ["zs", "grouped"])
def test_the_plan_is_cheap_and_its_export_computes_what_was_measured(
    world: Path, tmp_path: Path, recovery: str, objective: str
) -> None:
    more = LATENCY if objective == "latency" else []
    result = answer(*plan_arguments(world, tmp_path / "plan.json", recovery, *more))
    plan, record = SPDPlan.load(tmp_path / "plan.json"), result["optimized"]
    measured = record["measured"]
    assert plan.sync_points == measured["sync_points"]
    assert set(plan.low_bit.values()) <= {"int8", "int3"}
    assert plan.low_bit
    assert (result["dropped"], result["low_bit"]) == (
        plan.dropped,
        {str(p): c for p, c in plan.low_bit.items()},
    )
    assert record["points"] == {c: plan.sync_points.count(c) for c in ("none", "int8", "int3", "full")}
    assert record["cost"]["after"] < record["cost"]["before"]
    assert 0 <= measured["increase"] <= LIMIT
    assert {b.recovery for i, b in enumerate(plan.blocks) if {2 * i, 2 * i + 1} & set(plan.dropped)} <= {
        recovery
    }
    if objective == "bytes":
        per_token = traffic(plan, 4)["bytes_per_token"]
        assert record["cost"]["before"] == per_token["before"]
        assert record["cost"]["after"] == pytest.approx(per_token["after"], abs=0.5)

    export = exported(world, tmp_path / "plan.json", recovery, tmp_path)
    assert CheckpointReader(export).plan.sync_points == plan.sync_points  # type: ignore[union-attr]
    scored = answer("evaluate", "--model", export, *data(world))
    assert scored["perplexity"] == pytest.approx(measured["perplexity"], rel=1e-5)


def test_the_same_command_again_measures_nothing(world: Path, tmp_path: Path) -> None:
    argv = plan_arguments(world, tmp_path / "plan.json", "zs")
    first = answer(*argv)
    state = tmp_path / "plan.json.search.collectives.json"
    kept, written = state.read_text(), state.stat().st_mtime_ns
    assert len(json.loads(kept)["sets"]) == len(first["optimized"]["measured"]["history"]) > 1
    assert answer(*argv) == first
    assert state.stat().st_mtime_ns == written
    # Half of the measurements, as if the search had been killed: the others are made again, to the bit.
    half = json.loads(kept)
    half["sets"] = half["sets"][: len(half["sets"]) // 2]
    state.write_text(json.dumps(half))
    assert answer(*argv) == first
    assert state.read_text() == kept


def test_without_measurements_the_scores_decide(world: Path, tmp_path: Path) -> None:
    argv = plan_arguments(world, tmp_path / "plan.json", "zs", "--search-budget", 0)
    record = answer(*argv)["optimized"]
    assert record["measured"] is None
    assert record["predicted_increase"] <= LIMIT
    assert record["cost"]["after"] < record["cost"]["before"]
    printed = command(*argv).out
    assert "bytes per token: " in printed
    assert "perplexity, allowed +4.0 %: predicted +" in printed


def test_run_takes_the_same_options(world: Path, tmp_path: Path) -> None:
    chosen = ["--collectives", FORMATS, "--max-perplexity-increase", LIMIT, "--search-budget", 4]
    argv: list[Any] = ["run", *common(world), "--out", tmp_path / "run", "--recovery", "grouped", *chosen]
    result = answer(*argv, "--eval-sequences", 3, "--tracking", "none")
    record = result["optimized"]
    plan = CheckpointReader(tmp_path / "run" / "export").plan
    assert plan is not None
    assert plan.sync_points == record["measured"]["sync_points"]
    assert result["bytes_per_token"]["after"] == pytest.approx(record["cost"]["after"], abs=0.5)
    assert "Choice among drop, low-bit and full" in (tmp_path / "run" / "report" / "report.md").read_text()


@pytest.mark.parametrize("missing", [{"low_bit": None}, {"low_bit": []}, {}])
def test_formats_without_scores(world: Path, tmp_path: Path, missing: dict[str, Any]) -> None:
    held = json.loads((world / "zs.json").read_text())
    (tmp_path / "s.json").write_text(json.dumps(held | missing))
    formats = FORMATS if missing else "int8,int5"
    argv = plan_arguments(world, tmp_path / "plan.json", "zs", "--collectives", formats)
    words = f"measure again with `megatron-spd sensitivity --collectives {formats} --sync-points any`"
    assert_one_line(command(*argv, "--sensitivity", tmp_path / "s.json"), words)
    assert not (tmp_path / "plan.json").exists()
