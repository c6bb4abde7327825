"""Full recovery on a tiny trained model: grouped, searched, calibrated, distilled and finished, through the command
line."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_spd.checkpoint.hf import CheckpointReader
from megatron_spd.plan import SPDPlan
from tests.command_line import answer, files
from tests.e2e.full_run import (
    BRANCHES,
    BUDGET,
    CALIBRATION,
    DISTILLED,
    DROPS,
    LAYERS,
    LENGTH,
    SCORED,
    SCORED_FROM,
    SEQUENCES,
    TIERS,
    TRAINING,
    data,
    make_world,
    run_arguments,
)
from tests.models import tiny_tokenizer

#: The steps after which `run` scores the model.
STEPS = ["plain", "zero_shot", "grouped", "final"]
MEASURED = ["--calibration-sequences", CALIBRATION]
CHOSEN = ["--branches", BRANCHES, "--search-budget", BUDGET, *TIERS]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model ``model`` and the text ``text``."""
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def whole(world: Path) -> dict[str, Any]:
    """The answer of `run`; its folder is ``world/run``."""
    return answer(*run_arguments(world, world / "run"))


@pytest.fixture(scope="module")
def chain(world: Path) -> dict[str, dict[str, Any]]:
    """The answers of the commands that `run` stands for, one after the other, by name; their files lie in ``world``."""
    model, plan = ["--model", world / "model"], ["--plan", world / "grouped.json"]
    measured = ["--sensitivity", world / "s.json", *CHOSEN]
    calibrated, training = ["--calibrated", world / "calibrated"], [*TRAINING, "--finish", "blocks"]
    sensitivity = ["--grouped", "--method", "single", "--branches", BRANCHES, "--out", world / "s.json"]
    return {
        "sensitivity": answer("sensitivity", *model, *data(world), *MEASURED, *sensitivity),
        "plan": answer("plan", *model, *data(world), *MEASURED, *measured, "--out", world / "plan.json"),
        "group": answer(
            *["group", *model, *data(world), *MEASURED, *calibrated, "--plan", world / "plan.json"],
            *["--out", world / "grouped.json"],
        ),
        "distill": answer(
            *["distill", *model, *plan, *data(world, DISTILLED), *calibrated, *training],
            *["--out", world / "trained"],
        ),
        "export": answer(
            *["export", *model, *plan, *calibrated, "--distilled", world / "trained", "--out", world / "spd"]
        ),
    }


@torch.no_grad()
def transformers_perplexity(folder: Path, world: Path, first: int, sequences: int) -> float:
    """Each piece of the text scored on its own by transformers, which loads the folder as a user would."""
    ids = tiny_tokenizer()((world / "text").read_text(), add_special_tokens=False)["input_ids"]
    pieces = torch.tensor(ids[first * LENGTH : (first + sequences) * LENGTH]).view(sequences, LENGTH)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    return math.exp(torch.stack([model(t[None], labels=t[None]).loss.double() for t in pieces]).mean())


# ---- run ------------------------------------------------------------------------------------------------------------


def test_what_run_reports_is_what_transformers_computes(world: Path, whole: dict[str, Any]) -> None:
    assert list(whole["perplexity"]) == STEPS
    for step, folder in {"plain": world / "model", "final": world / "run" / "export"}.items():
        expected = transformers_perplexity(folder, world, SCORED_FROM, SCORED)
        assert whole["perplexity"][step] == pytest.approx(expected, rel=1e-4)
    assert len(whole["dropped"]) == DROPS
    assert whole["all_reduces_per_token"] == {"before": 2 * LAYERS, "after": 2 * LAYERS - DROPS}


def test_every_step_has_an_interval_and_every_recovery_an_increase(whole: dict[str, Any]) -> None:
    plain = whole["perplexity"]["plain"]
    assert list(whole["interval"]) == STEPS
    assert list(whole["increase"]) == STEPS[1:]
    for step in STEPS:
        low, high = whole["interval"][step]
        assert low < whole["perplexity"][step] < high
    for step in STEPS[1:]:
        increase, low, high = whole["increase"][step]
        assert increase == pytest.approx(100 * (whole["perplexity"][step] / plain - 1), abs=1e-6)
        assert low < increase < high


def test_calibration_notes_all_candidates_of_every_block_it_touched(
    world: Path, whole: dict[str, Any]
) -> None:
    plan = SPDPlan.load(world / "run" / "plan.json")
    records = {r["block"]: r for r in whole["calibration"]}
    assert list(records) == [block for unit in plan.units() for block in unit]
    for block, record in records.items():
        assert record["errors"].keys() == record["kept"].keys()
        for part, errors in record["errors"].items():
            assert record["kept"][part] == min(errors, key=errors.__getitem__)
        # Heads may move where nothing is pending in front of a dropped attention point, unless no candidate moves them.
        schedule = plan.block_schedule(block)
        if "heads" in record["errors"]:
            assert schedule.drop_attention
            assert not schedule.pending
            assert record["errors"]["heads"].keys() <= {"original", "published", "joint"}
        moved = record["kept"].get("heads", "original") != "original"
        assert (plan.blocks[block].kv_group_order is not None) == moved
        assert (plan.blocks[block].neuron_order is not None) == record["kept"]["mlp"].endswith("neurons")
    assert any("heads" in r["errors"] for r in records.values())
    assert any(b.attention_shift or b.mlp_shift for b in plan.blocks)


def test_the_search_stays_within_its_budget_and_returns_the_best(whole: dict[str, Any]) -> None:
    history = whole["search"]["history"]
    assert 1 < len(history) <= BUDGET
    assert {len(m["points"]) for m in history} == {DROPS}
    best = min(history, key=lambda m: m["perplexity"])
    assert whole["dropped"] == best["points"] == whole["search"]["points"]


def test_training_is_recorded_and_in_the_export(world: Path, whole: dict[str, Any]) -> None:
    plan = SPDPlan.load(world / "run" / "plan.json")
    assert [u["blocks"] for u in whole["units"]] == [list(unit) for unit in plan.units()]
    assert all(u["losses"] for u in whole["units"])
    for unit in whole["units"]:
        assert unit["recovery"] == ("grouped+b2b" if unit["kept"] else "grouped")
        recoveries = {plan.blocks[block].recovery for block in unit["blocks"]}
        assert recoveries - {""} == {unit["recovery"]}  # a block that only reads what is pending has none
    finish = whole["finish"]
    assert finish["which"] == "blocks"
    assert finish["kept"] is True
    assert finish["kl_after"] < finish["kl_before"]
    assert finish["blocks"] == [block for unit in plan.units() for block in unit]
    exported = CheckpointReader(world / "run" / "export")
    for block in finish["blocks"]:
        for name, tensor in load_file(world / "run" / "finish" / f"block_{block:04d}.safetensors").items():
            assert torch.equal(exported.block(block)[name.split(":")[1]], tensor)


def test_grouped_recovery_trains_nothing(world: Path, whole: dict[str, Any], tmp_path: Path) -> None:
    result = answer(*run_arguments(world, tmp_path / "run", "--recovery", "grouped"))
    assert (result["units"], result["finish"]) == ([], None)
    assert not (tmp_path / "run" / "distill").exists()
    assert not (tmp_path / "run" / "finish").exists()
    # The export is what was calibrated.
    assert result["perplexity"]["final"] == pytest.approx(result["perplexity"]["grouped"], rel=1e-6)
    assert result["perplexity"]["grouped"] == pytest.approx(whole["perplexity"]["grouped"], rel=1e-6)
    plan = CheckpointReader(tmp_path / "run" / "export").plan
    assert plan is not None
    assert {b.recovery for b in plan.blocks} <= {"", "grouped"}


# ---- the separate commands ------------------------------------------------------------------------------------------


def test_the_commands_one_by_one_give_what_run_gives(
    world: Path, whole: dict[str, Any], chain: dict[str, dict[str, Any]]
) -> None:
    assert chain["plan"]["dropped"] == whole["dropped"]
    assert chain["plan"]["search"] == whole["search"]
    assert chain["group"]["blocks"] == whole["calibration"]
    assert chain["distill"]["units"] == whole["units"]
    assert chain["distill"]["finish"] == whole["finish"]
    ours, theirs = files(world / "spd"), files(world / "run" / "export")
    assert ours.keys() == theirs.keys()
    # The plan in config.json says where it came from, and `run` notes in it which units training has improved.
    assert [name for name in ours if ours[name] != theirs[name]] == ["config.json"]
    plans = [CheckpointReader(world / folder).plan for folder in ("spd", "run/export")]
    one, other = (_without_origin(p) for p in plans if p is not None)
    assert one == other


def _without_origin(plan: SPDPlan) -> SPDPlan:
    blocks = [dataclasses.replace(b, recovery="") for b in plan.blocks]
    return dataclasses.replace(plan, blocks=blocks, provenance={})


def test_sensitivity_was_measured_with_the_blocks_grouped(
    world: Path, chain: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    written = json.loads((world / "s.json").read_text())
    assert written["grouped"] is True
    single = ["--method", "single", "--branches", BRANCHES, "--measure", "kl", "--out", tmp_path / "s.json"]
    bare = answer("sensitivity", "--model", world / "model", *data(world), *single)
    assert bare["grouped"] is False
    assert bare["plain_perplexity"] == written["plain_perplexity"]
    # Calibration is judged on other text, block by block; on the whole it must help on this one.
    pairs = [
        (g["sensitivity"], b["sensitivity"]) for g, b in zip(written["single"], bare["single"], strict=True)
    ]
    assert sum(grouped for grouped, _ in pairs) < sum(plain for _, plain in pairs)


def test_planning_again_measures_nothing_and_gives_the_same_plan(
    world: Path, chain: dict[str, dict[str, Any]]
) -> None:
    state = world / "plan.json.search.json"
    plan, held = (world / "plan.json").read_bytes(), state.stat().st_mtime_ns
    again = ["--sensitivity", world / "s.json", *CHOSEN, *data(world), *MEASURED]
    answer("plan", "--model", world / "model", *again, "--out", world / "plan.json")
    assert (world / "plan.json").read_bytes() == plan
    assert state.stat().st_mtime_ns == held


def test_without_a_search_the_scores_alone_decide(
    world: Path, chain: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    """Neither text nor ranks are needed then."""
    chosen = [
        "--branches",
        BRANCHES,
        "--search-budget",
        0,
        "--drop-count",
        1,
        "--out",
        tmp_path / "plan.json",
    ]
    result = answer("plan", "--model", world / "model", "--sensitivity", world / "s.json", *chosen)
    least = min(chain["sensitivity"]["single"], key=lambda e: e["sensitivity"])
    assert result["dropped"] == [least["point"]]
    assert result["search"] is None
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_a_perplexity_budget_is_kept_by_what_is_exported(
    world: Path, chain: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    """The set is the largest that was measured within 2 %, and its calibrated export is within 2 % on that text."""
    model = ["--model", world / "model"]
    chosen = ["--sensitivity", world / "s.json", "--branches", BRANCHES, "--search-budget", 8]
    result = answer(
        *["plan", *model, *data(world), *MEASURED, *chosen, "--max-perplexity-increase", "2%"],
        *["--out", tmp_path / "plan.json"],
    )
    plain = answer("evaluate", *model, *data(world))["perplexity"]
    history = result["search"]["history"]
    fitting = [m for m in history if m["perplexity"] <= 1.02 * plain]
    assert 0 < len(fitting) < len(history)
    assert len(result["dropped"]) == max(len(m["points"]) for m in fitting)
    grouped = ["--plan", tmp_path / "plan.json", "--calibrated", tmp_path / "calibrated"]
    answer("group", *model, *data(world), *MEASURED, *grouped, "--out", tmp_path / "grouped.json")
    exported = ["--plan", tmp_path / "grouped.json", "--calibrated", tmp_path / "calibrated"]
    answer("export", *model, *exported, "--out", tmp_path / "spd")
    perplexity = answer("evaluate", "--model", tmp_path / "spd", *data(world))["perplexity"]
    # The search's figure is this perplexity, or the one that the divergence stands for, if that is greater.
    assert perplexity <= result["search"]["perplexity"] * (1 + 1e-6)
    assert perplexity <= 1.02 * plain
    assert perplexity == pytest.approx(
        transformers_perplexity(tmp_path / "spd", world, 0, SEQUENCES), rel=1e-4
    )


# ---- several ranks --------------------------------------------------------------------------------------------------


def assert_agree(several: dict[str, Any], one: dict[str, Any], ranks: int) -> None:
    assert (several["ranks"], one["ranks"]) == (ranks, 1)
    assert several["dropped"] == one["dropped"]
    for step, perplexity in one["perplexity"].items():
        assert several["perplexity"][step] == pytest.approx(perplexity, rel=1e-3), step


def test_two_ranks_agree_with_one(world: Path, whole: dict[str, Any], tmp_path: Path) -> None:
    assert_agree(answer(*run_arguments(world, tmp_path / "run", "--ranks", 2)), whole, 2)


def test_three_ranks_agree_with_one(tmp_path: Path) -> None:
    """Six key/value groups in three branches."""
    world = make_world(tmp_path, hidden=36, groups=6)
    one = answer(*run_arguments(world, tmp_path / "one", "--branches", 3))
    several = answer(*run_arguments(world, tmp_path / "several", "--branches", 3, "--ranks", 3))
    assert_agree(several, one, 3)
