"""The curve of a small random model: its numbers are those of the plans and weights it names, and it goes on."""

from __future__ import annotations

import json
import multiprocessing
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_spd import cli, curve_variants, stages
from megatron_spd.checkpoint.hf import CheckpointReader
from megatron_spd.compensation import calibrate_into
from megatron_spd.evaluate.perplexity import plan_perplexity
from megatron_spd.grouping.calibrate import Ingredients
from megatron_spd.options import VARIANTS
from megatron_spd.plan import SPDPlan
from megatron_spd.runtime.distributed import initialize
from tests.command_line import answer, command, files
from tests.e2e.bad_input import assert_one_line
from tests.e2e.test_resume import kill_self, on_call
from tests.models import make_export, make_llama, tiny_text, tiny_tokenizer

BRANCHES, RATIOS = 2, [0.4, 1.0]
MEASURED, CALIBRATED, TRAINED, SCORED, LENGTH = 2, 8, 24, 5, 16


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model whose heads can be grouped, and a text."""
    folder = tmp_path_factory.mktemp("work")
    make_llama(folder / "model", heads=8, kv=4, layers=3)
    (folder / "text").write_text(tiny_text(), encoding="utf-8")
    return folder


def arguments(work: Path, out: Path, *more: object) -> list[object]:
    fixed = [
        "curve",
        "--model",
        work / "model",
        "--out",
        out,
        "--branches",
        BRANCHES,
        "--data",
        work / "text",
    ]
    sizes = ["--sequences", MEASURED, "--calibration-sequences", CALIBRATED, "--eval-sequences", SCORED]
    training = ["--distill-sequences", TRAINED, "--epochs", 2, "--micro-batch-size", 1]
    training += ["--learning-rate", 3e-3, "--finish-learning-rate", 3e-3]
    ratios = ["--ratios", "0.4,1", "--search-budget", 3, "--seq-length", LENGTH]
    return [*fixed, *sizes, *training, *ratios, *more]


@pytest.fixture(scope="module")
def whole(work: Path) -> dict[str, Any]:
    """The curve with everything, in ``work / "curve"``."""
    tasks = ["--tasks", "spd_continuation", "--limit", 5, "--task-variants", "zero-shot,neurons"]
    return answer(*arguments(work, work / "curve", "--orders", *tasks))


def cells_of(curve: Mapping[str, Any]) -> dict[tuple[str, float], dict[str, Any]]:
    return {(c["variant"], c["ratio"]): c for c in curve["cells"]}


def pieces(work: Path, skip: int, count: int) -> Tensor:
    ids = tiny_tokenizer()((work / "text").read_text(), add_special_tokens=False)["input_ids"]
    return torch.tensor(ids[skip * LENGTH : (skip + count) * LENGTH]).view(count, LENGTH)


def test_every_variant_has_a_cell_at_every_ratio(work: Path, whole: dict[str, Any]) -> None:
    assert list(cells_of(whole)) == [(v, r) for v in VARIANTS for r in RATIOS]
    for ratio, count in zip(RATIOS, (2, 5), strict=True):
        sets = {tuple(c["dropped"]) for c in whole["cells"] if c["ratio"] == ratio}
        assert [len(dropped) for dropped in sets] == [count]
    kept = json.loads((work / "curve" / "curve.json").read_text())
    assert {key: whole[key] for key in kept} == kept
    assert all(Path(path).is_file() for path in whole["paths"].values())
    assert not (work / "curve" / "exported").exists()


def test_the_cells_are_the_perplexities_of_their_plans_and_weights(
    work: Path, whole: dict[str, Any], tmp_path: Path
) -> None:
    reader, runtime = CheckpointReader(work / "model"), initialize()
    scoring = pieces(work, TRAINED, SCORED)
    calibration = pieces(work, MEASURED, CALIBRATED)
    dense = SPDPlan.dense(reader.base_model(), BRANCHES)

    def perplexity(plan: SPDPlan, *folders: Path) -> float:
        streamer = stages.make_streamer(reader, runtime)
        streamer.weights = stages.trained_weights(folders, stages.final_weights(reader, plan))
        return plan_perplexity(streamer, plan, scoring)[0]

    assert whole["plain"]["perplexity"] == pytest.approx(perplexity(dense), rel=1e-6)
    for (variant, ratio), cell in cells_of(whole).items():
        plan, out = dense.with_drops(cell["dropped"]), work / "curve" / f"{ratio:g}"
        found: list[Path] = []
        if variant == "heads":
            for point in (p for p in cell["dropped"] if p % 2 == 0):
                plan = plan.with_block(point // 2, recovery="hg+b2b")
            plan = stages.group_plan(stages.make_streamer(reader, runtime), plan, calibration)
            assert all(plan.blocks[p // 2].kv_group_order for p in cell["dropped"] if p % 2 == 0)
        elif variant in ("shift", "neurons", "all"):
            found = [tmp_path / f"{variant} {ratio}"]
            allowed = {
                "shift": Ingredients("none", neurons=False, norm=False, refit=False),
                "neurons": Ingredients("none", shift=False, norm=False, refit=False),
                "all": Ingredients(norm=False),
            }[variant]
            streamer = stages.make_streamer(reader, runtime)
            plan, _ = calibrate_into(streamer, plan, calibration, allowed, found[0])
        elif variant in ("b2b", "finish"):
            stage = json.loads((work / "curve" / "stages" / f"calibration {ratio:g}.json").read_text())
            plan = SPDPlan.from_dict(stage["result"])
            found = [out / "distill", out / "calibrated"]
            found = [out / "finish", *found] if variant == "finish" else found
        assert cell["perplexity"] == pytest.approx(perplexity(plan, *found), rel=1e-5), (variant, ratio)
        percent = 100 * (cell["perplexity"] / whole["plain"]["perplexity"] - 1)
        assert cell["increase"][0] == pytest.approx(percent, rel=1e-6)
        assert cell["increase"][1] < cell["increase"][0] < cell["increase"][2]


def test_the_variants_are_not_all_the_same(whole: dict[str, Any]) -> None:
    at_most = {v: cells_of(whole)[v, 1.0]["perplexity"] for v in VARIANTS}
    assert len(set(at_most.values())) == len(VARIANTS)


def test_accuracy_is_that_of_the_exported_cell(work: Path, whole: dict[str, Any], tmp_path: Path) -> None:
    cell = cells_of(whole)["zero-shot", 1.0]
    exported = make_export(work / "model", tmp_path / "spd", BRANCHES, cell["dropped"])
    data = ["--data", work / "text", "--sequences", 1, "--seq-length", LENGTH]
    asked = ["--tasks", "spd_continuation", "--limit", 5]
    found = answer("evaluate", "--model", exported, "--against", work / "model", *data, *asked)
    assert cell["tasks"] == found["tasks"]
    assert whole["plain"]["tasks"] == found["against"]["tasks"]
    measured = {v for (v, _), c in cells_of(whole).items() if c["tasks"] is not None}
    assert measured == {"zero-shot", "neurons"}


def test_orders_before_and_after_grouping(work: Path, whole: dict[str, Any]) -> None:
    single = [
        "--branches",
        BRANCHES,
        "--data",
        work / "text",
        "--sequences",
        MEASURED,
        "--seq-length",
        LENGTH,
    ]
    swept = answer(
        "sensitivity",
        "--model",
        work / "model",
        *single,
        "--out",
        work / "s.json",
        "--method",
        "single",
        "--measure",
        "kl",
    )
    points = whole["orders"]["points"]
    expected = [e["sensitivity"] for e in swept["single"]]
    assert [p["before"] for p in points] == pytest.approx(expected, rel=1e-5)
    assert [p["after"] for p in points] != pytest.approx(expected, rel=1e-2)
    assert -1 <= whole["orders"]["spearman"] <= 1


def test_it_is_drawn_again_from_its_numbers(work: Path, whole: dict[str, Any]) -> None:
    before = files(work / "curve")
    for name in ("curve.png", "curve.html", "curve.md", "orders.png"):
        (work / "curve" / name).unlink()
    paths = answer("report", "--run", work / "curve")["paths"]
    assert paths == whole["paths"]
    assert files(work / "curve") == before


def test_more_of_it_costs_only_what_is_new(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    losses = curve_variants.Variants.losses

    def counted(self: curve_variants.Variants, variant: str, ratio: float, plan: SPDPlan) -> list[float]:
        asked.append(f"{variant} {ratio:g}")
        return losses(self, variant, ratio, plan)

    monkeypatch.setattr(curve_variants.Variants, "losses", counted)
    some = arguments(work, tmp_path / "c")
    answer(*some, "--variants", "zero-shot,shift", "--ratios", "0.4")
    assert asked == ["zero-shot 0.4", "shift 0.4"]
    more = answer(*some, "--variants", "zero-shot,neurons", "--ratios", "0.4,0.8")
    assert asked[2:] == ["zero-shot 0.8", "neurons 0.4", "neurons 0.8"]
    assert list(cells_of(more)) == [(v, r) for v in ("zero-shot", "neurons") for r in (0.4, 0.8)]
    assert command(*some, "--variants", "zero-shot", "--ratios", "0.4").out.startswith("model, G = 2: plain")


def _run_until_killed(measurement: int, argv: list[str]) -> None:
    """Runs in a process of its own. The first measurement is that of the plain model."""
    curve_variants.plan_nll = on_call(measurement, curve_variants.plan_nll, kill_self)
    cli.main(argv)


@pytest.mark.parametrize(
    ("measurement", "finished"),
    [
        (5, ["all 0.4", "all 1", "zero-shot 0.4", "set 1"]),
        # Behind the training of the cell that is not measured yet.
        (14, ["b2b 1", "last pass 0.4"]),
    ],
)
def test_a_killed_curve_repeats_no_cell_and_ends_with_the_same_numbers(
    work: Path, whole: dict[str, Any], tmp_path: Path, measurement: int, finished: list[str]
) -> None:
    argv = [str(a) for a in arguments(work, tmp_path / "curve")]
    process = multiprocessing.get_context("forkserver").Process(
        target=_run_until_killed, args=(measurement, argv)
    )
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    kept = sorted((tmp_path / "curve" / "stages").glob("*.json"))
    assert set(finished) <= {p.stem for p in kept}
    part = json.loads((tmp_path / "curve" / "curve.json").read_text())
    assert len(part["cells"]) == measurement - 2
    before = [(p.stat().st_ino, p.stat().st_mtime_ns) for p in kept]

    again = answer(*argv)
    assert [(p.stat().st_ino, p.stat().st_mtime_ns) for p in kept] == before
    without_tasks = [c | {"tasks": None} for c in whole["cells"]]
    assert again["cells"] == without_tasks


def test_two_ranks_find_the_same_curve(work: Path, tmp_path: Path) -> None:
    # Shifts are sums over all ranks' tokens; orders are chosen on the main rank's share of them.
    some = ["--variants", "zero-shot,heads,all", "--ratios", "0.4", "--ingredients", "shift"]
    one, two = (answer(*arguments(work, tmp_path / f"{m}", *some, "--ranks", m)) for m in (1, 2))
    for key, cell in cells_of(two).items():
        expected = cells_of(one)[key]
        assert cell["dropped"] == expected["dropped"]
        assert cell["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-3), key
    assert len(one["cells"]) == len(two["cells"]) == 3


def test_mistakes_are_one_line(work: Path, whole: dict[str, Any], tmp_path: Path) -> None:
    for out, more, words in (
        (tmp_path / "a", ["--variants", "b2b,magic"], "--variants has 'magic'"),
        (tmp_path / "b", ["--tasks", "no_such_task"], "unknown task 'no_such_task'"),
        (tmp_path / "c", ["--branches", 3], "G = 3"),
        (work / "curve", ["--seed", 5], "holds another run: its seed is 1234, this one's 5"),
        (work / "model", [], "is not a run folder"),
        (tmp_path / "d", ["--distill-sequences", 1], "--distill-sequences is 1; it must be >= 2"),
        (tmp_path / "e", ["--eval-sequences", 100_000], "text"),
    ):
        assert_one_line(command(*arguments(work, out, *more)), words)
        assert not (out / "curve.json").exists() or out == work / "curve"
