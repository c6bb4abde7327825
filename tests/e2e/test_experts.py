"""Commands on a model with experts: what works, and what is refused before any work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_spd.checkpoint.hf import CheckpointReader
from megatron_spd.plan import SPDPlan
from tests.command_line import answer, command
from tests.e2e.bad_input import assert_one_line
from tests.families import make_model
from tests.models import tiny_text

BRANCHES = ["--branches", 2]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    make_model("mixtral", folder / "model")
    (folder / "text").write_text(tiny_text(20))
    return folder


def pieces(world: Path) -> list[object]:
    return ["--model", world / "model", "--data", world / "text", "--sequences", 3, "--seq-length", 8]


def test_the_papers_recovery_without_head_grouping(world: Path, tmp_path: Path) -> None:
    """Every tier ESB and above is distilled; that heads are not grouped is on record; the export keeps the routing."""
    training = ["--epochs", 1, "--micro-batch-size", 1, "--tracking", "none"]
    tiers = ["--sync-points", "attention", "--drop-ratio", 1, "--tau1", -1e6, "--tau2", -1e5]
    run = ["run", *pieces(world), *BRANCHES, *training, *tiers, "--recovery", "paper", "--routing", "first"]
    answer(*run, "--out", tmp_path / "run", "--eval-sequences", 2, "--distill-sequences", 3)
    plan = CheckpointReader(tmp_path / "run" / "export").plan
    assert plan is not None
    assert plan.routing == "first"
    assert [block.tier for block in plan.blocks] == ["ESB"] * 3
    # A block that training does not help ends as it began.
    assert {block.recovery for block in plan.blocks} <= {"b2b", "zs"}
    assert all(block.kv_group_order is None for block in plan.blocks)
    assert plan.provenance["head_grouping"].startswith("not done")


def test_calibration_is_refused(world: Path, tmp_path: Path) -> None:
    words = "look at the neurons of one MLP, and a mixtral block has several"
    assert_one_line(command("run", *pieces(world), *BRANCHES, "--out", tmp_path / "run"), words)
    grouped = ["sensitivity", *pieces(world), *BRANCHES, "--grouped", "--out", tmp_path / "s.json"]
    assert_one_line(command(*grouped), words)
    plan = SPDPlan.dense(CheckpointReader(world / "model").base_model(), 2).with_drops([0])
    plan.with_block(0, tier="ESB", recovery="hg+b2b").save(tmp_path / "plan.json")
    group = ["group", *pieces(world), "--plan", tmp_path / "plan.json", "--out", tmp_path / "out.json"]
    assert_one_line(command(*group), words)


def test_routing_is_an_option_of_experts_alone(world: Path, tmp_path: Path) -> None:
    sensitivity, out = tmp_path / "s.json", tmp_path / "plan.json"
    answer("sensitivity", *pieces(world), *BRANCHES, "--out", sensitivity)
    asked = ["plan", *pieces(world), *BRANCHES, "--sensitivity", sensitivity, "--out", out]
    choice = ["--drop-count", 1, "--search-budget", 0]
    assert_one_line(command(*asked, *choice), "a mixtral block has several")
    answer(*asked, *choice, "--recovery", "zs", "--routing", "first")
    assert json.loads(out.read_text())["routing"] == "first"
    make_model("qwen3", tmp_path / "dense")
    dense = ["--model", tmp_path / "dense"]
    answer("sensitivity", *pieces(world), *dense, *BRANCHES, "--out", sensitivity)
    refused = command(*asked, *dense, *choice, "--routing", "first")
    assert_one_line(refused, "--routing is for models with experts; qwen3 has none")
