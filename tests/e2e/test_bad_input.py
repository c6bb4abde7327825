"""What the user can get wrong: exit code 2, one clear line, no traceback, and nothing written."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_spd.plan import SPDPlan
from tests.command_line import Outcome, answer, command, files
from tests.disk import small_disk
from tests.e2e.bad_input import (
    Mistake,
    arguments,
    assert_one_line,
    config,
    damaged,
    edited_sensitivity,
    model,
    new_file,
    occupied,
    of_world,
    option,
    plan_of_version,
    tensors,
    text,
    truncate,
    write_plan,
)
from tests.models import make_llama, tiny_text


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of good things: two models, a text, and of the first a sensitivity, a plan, and what follows from it."""
    folder = tmp_path_factory.mktemp("world")
    for seed, name in enumerate(("model", "other")):
        make_llama(folder / name, layers=2, seed=seed)
    (folder / "text").write_text(tiny_text(), encoding="utf-8")
    write_plan(folder / "model", folder / "plan.json")
    write_plan(folder / "other", folder / "other_plan.json")
    for name, more in {
        "sensitivity": ["--out", folder / "s.json"],
        "calibrate": ["--calibrated", folder / "calibrated", "--out", folder / "grouped.json"],
        "distill": ["--out", folder / "distilled"],
        "export": ["--out", folder / "spd"],
        "run": ["--out", folder / "run"],
    }.items():
        answer(*arguments(name, folder, folder), *more)
    return folder


NORM = "model.layers.0.input_layernorm.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"
TEXT = "Too short."
CASES: list[tuple[str, Mistake, str]] = [
    # A missing or empty model folder.
    *[
        (c, option("--model", "nowhere"), "no model")
        for c in ("prepare", "evaluate", "generate", "run", "sensitivity")
    ],
    ("evaluate", lambda _, out: [(out / "m").mkdir(), "--model", out / "m"][1:], "has no config.json"),
    ("evaluate", of_world("--model", "text"), "no model folder at"),
    ("evaluate", model(lambda m: (m / "config.json").write_text("{")), "config.json is not JSON"),
    ("evaluate", model(lambda m: (m / "model.safetensors").unlink()), "has no weights"),
    ("evaluate", model(lambda m: (m / "tokenizer.json").unlink()), "has no tokenizer"),
    # A missing or empty text, and one that is too short.
    *[
        (c, option("--data", "nowhere"), "no text file")
        for c in ("evaluate", "sensitivity", "group", "distill", "run")
    ],
    ("run", option("--eval-data", "nowhere"), "no text file at nowhere"),
    *[(c, text(b" \n"), "is empty") for c in ("evaluate", "run")],
    ("evaluate", text(b"\xff\xfe\x00"), "is not UTF-8"),
    *[
        (c, text(TEXT.encode()), "tokens, but 3 sequences of 8")
        for c in ("evaluate", "sensitivity", "group", "distill")
    ],
    ("run", text(tiny_text(1).encode()), "use fewer or shorter pieces"),
    ("distill", option("--sequences", 1), "at least 2"),
    ("distill", option("--gradient-accumulation", 50), "use more sequences or a smaller batch"),
    ("run", option("--gradient-accumulation", 50), "use more sequences or a smaller batch"),
    # G that does not divide heads, key/value groups or neurons.
    *[(c, option("--branches", 4), "G may be one of [1, 2]") for c in ("sensitivity", "plan", "run")],
    ("run", option("--branches", 0), "--branches is 0"),
    # M.
    (
        "distill",
        option("--tensor-parallel", 3),
        "M = 3 ranks cannot run a plan of G = 2 branches; M may be one of [1, 2]",
    ),
    ("run", option("--tensor-parallel", 2), "do not divide the 1 launched ranks"),
    # Damaged weights.
    *[(c, model(truncate), "truncated") for c in ("prepare", "evaluate", "export", "run")],
    *[
        (c, model(tensors(lambda t: t.pop(NORM))), f"lacks tensor {NORM}")
        for c in ("prepare", "evaluate", "run")
    ],
    ("evaluate", model(tensors(lambda t: t.update({NORM: torch.ones(31)}))), "has shape [31]"),
    ("evaluate", model(tensors(lambda t: t.update(extra=torch.ones(1)))), "does not account for"),
    # Families.
    *[(c, model(config(model_type="gpt2")), "gpt2") for c in ("prepare", "evaluate", "generate", "run")],
    # Plans.
    *[
        (c, of_world("--plan", "other_plan.json"), "the plan was made for")
        for c in ("group", "distill", "export")
    ],
    ("sensitivity", of_world("--plan", "other_plan.json"), "the plan was made for"),
    *[(c, plan_of_version(99), "plan field 'version': got 99") for c in ("group", "distill", "export")],
    ("export", option("--plan", "nowhere"), "no plan at nowhere"),
    ("export", new_file("--plan", "{"), "is not JSON"),
    ("export", new_file("--plan", "[]"), "plan"),
    ("export", of_world("--model", "spd"), "is an SPD export already"),
    ("evaluate", lambda w, o: _export_of_version(w, o, 99), "plan field 'version': got 99"),
    # Distilled weights.
    ("export", of_world("--distilled", "model"), "is not the output folder of `megatron-spd distill`"),
    ("export", lambda w, o: _distilled_by_another_plan(w, o), "another plan"),
    # Sensitivities.
    ("plan", option("--sensitivity", "nowhere"), "no sensitivity file at nowhere"),
    *[
        ("plan", new_file("--sensitivity", bad), "is not a sensitivity file")
        for bad in ("{", "[]", "{}", '{"branches": 2}')
    ],
    ("plan", of_world("--model", "other"), "of another model"),
    ("plan", edited_sensitivity(branches=1), "measured with G = 1, not G = 2"),
    ("plan", lambda w, o: [*edited_sensitivity(single=None)(w, o), "--sync-points", "mlp"], "has no scores"),
    ("plan", option("--drop-count", 9), "9"),
    (
        "plan",
        option("--collectives", "int8", "--max-perplexity-increase", 2),
        "no low-bit scores of int8 at all points of 'any'; measure again with `megatron-spd sensitivity --coll",
    ),
    *[
        (c, option("--collectives", "int8,int1"), "collective 'int1': expected")
        for c in ("sensitivity", "run")
    ],
    # Outputs.
    *[(c, occupied(), "out") for c in ("prepare", "export", "run")],
    *[(c, occupied("out.json"), "is a folder") for c in ("sensitivity", "plan", "group")],
    *[(c, new_file("--out", "thesis", "mine"), "mine") for c in ("prepare", "export", "run", "distill")],
    (
        "prepare",
        lambda w, o: ["--model", w / "other", "--out", _copy(w / "model", o)],
        "already holds something else",
    ),
    (
        "export",
        lambda w, o: ["--plan", _other_drops(w, o), "--out", _copy(w / "spd", o)],
        "already holds something else",
    ),
    ("run", lambda w, o: ["--model", w / "other", "--out", _copy(w / "run", o)], "holds another run"),
    (
        "run",
        lambda w, o: ["--seed", 5, "--out", _copy(w / "run", o)],
        "holds another run: its seed is 1234, this one's 5",
    ),
    ("run", lambda w, o: ["--out", _copy(w / "run", o, "run.json")], "run.json"),
    ("distill", lambda w, o: ["--seed", 5, "--out", _copy(w / "distilled", o)], "another distillation"),
    (
        "distill",
        lambda w, o: ["--seed", 5, "--tracking", "wandb", "--out", _copy(w / "distilled", o)],
        "another dist",
    ),
    ("report", of_world("--run", "model"), "holds no finished run"),
    # Recovery.
    *[
        (
            c,
            option("--ingredients", "heads,glue"),
            "--ingredients has 'glue'; known are heads, neurons, shift",
        )
        for c in ("sensitivity", "plan", "group", "run")
    ],
    *[
        (c, option("--calibration-sequences", 10_000, *more), "10000 sequences of 8 after skipping 3 need")
        for c, *more in (["sensitivity", "--grouped"], ["plan"], ["calibrate"])
    ],
    ("run", option("--calibration-sequences", 10_000), "2 sequences of 8 after skipping 10003 need"),
    ("calibrate", option("--calibration-sequences", 1), "--calibration-sequences is 1; it must be >= 2"),
    *[(c, option("--search-budget", -1), "--search-budget is -1; it must be >= 0") for c in ("plan", "run")],
    ("plan", option("--max-perplexity-increase", "abc"), "invalid float value: 'abc'"),
    (
        "plan",
        option("--max-perplexity-increase", "-2%"),
        "--max-perplexity-increase is -2.0; it must be >= 0",
    ),
    ("plan", option("--max-perplexity-increase", "nan%"), "--max-perplexity-increase is nan"),
    *[
        (c, option("--finish", "blocks", "--finish-tokens", 7), "a budget of 7 tokens")
        for c in ("distill", "run")
    ],
    (
        "distill",
        option("--finish", "blocks", "--finish-sequences", 1),
        "--finish-sequences is 1; it must be >= 2",
    ),
    ("run", option("--finish-sequences", 10_000), "tokens, but 10000 sequences of 8"),
    ("sensitivity", lambda w, o: ["--grouped", "--plan", w / "plan.json"], "exclude each other"),
    # Calibrated weights: a plan with shifts needs its own.
    *[(c, of_world("--plan", "grouped.json"), "give it as --calibrated") for c in ("distill", "export")],
    *[
        (c, of_world("--calibrated", "calibrated"), "for another plan (block 0 dif")
        for c in ("distill", "export")
    ],
    *[
        (c, lambda w, o: _calibrated_for_other_drops(w, o), "other sync points")
        for c in ("distill", "export")
    ],
    ("export", of_world("--calibrated", "model"), "is not a folder of `megatron-spd group --calibrated`"),
    ("calibrate", of_world("--plan", "grouped.json"), "give the plan that `megatron-spd plan` wrote"),
    ("calibrate", lambda w, o: ["--calibrated", w / "calibrated", "--ingredients", "norm"], "or calibration"),
    ("calibrate", new_file("--calibrated", "thesis", "mine"), "a file is in its place"),
    # DeepSpeed's configuration.
    *[
        (c, option("--deepspeed_config", "nowhere"), "no DeepSpeed config at nowhere")
        for c in ("distill", "run")
    ],
    ("distill", new_file("--deepspeed_config", '{"zero_optimization": {"stage": 4}}'), "ZeRO stage 4"),
]


def _copy(source: Path, out: Path, spoiled: str | None = None) -> Path:
    """A copy of a folder as ``out/held``, one of its files overwritten."""
    shutil.copytree(source, out / "held")
    if spoiled is not None:
        (out / "held" / spoiled).write_text("{")
    return out / "held"


def _other_drops(world: Path, out: Path) -> Path:
    plan = SPDPlan.load(world / "plan.json").with_drops([2])
    plan.save(out / "plan.json")
    return out / "plan.json"


def _export_of_version(world: Path, out: Path, version: int) -> list[object]:
    held = _copy(world / "spd", out)
    plan = json.loads((held / "config.json").read_text())["spd_plan"]
    config(spd_plan=plan | {"version": version})(held)
    return ["--model", held]


def _distilled_by_another_plan(world: Path, out: Path) -> list[object]:
    return ["--plan", _other_drops(world, out), "--distilled", world / "distilled"]


def _calibrated_for_other_drops(world: Path, out: Path) -> list[object]:
    return ["--plan", _other_drops(world, out), "--calibrated", world / "calibrated"]


def _name(case: Any) -> str | None:
    return case if isinstance(case, str) else None


@pytest.mark.parametrize(("name", "mistake", "words"), CASES, ids=_name)
def test_a_mistake_is_one_line_and_writes_nothing(
    world: Path, tmp_path: Path, name: str, mistake: Mistake, words: str
) -> None:
    argv = [*arguments(name, world, tmp_path), *mistake(world, tmp_path)]
    before = files(tmp_path)
    outcome = command(*argv)
    assert_one_line(outcome, words)
    assert outcome.err.count("\n") == 1
    assert files(tmp_path) == before


# ---- NaN and infinity ---------------------------------------------------------------------------------------------


def put(name: str, value: float) -> Callable[[Path], None]:
    return tensors(lambda held: held[name].view(-1).__setitem__(7, value))


#: Finite weights whose products overflow fp32.
OVERFLOW = tensors(lambda held: held[DOWN].mul_(2e38))
WHERE = {
    "nan in a weight": put(DOWN, float("nan")),
    "inf in a weight": put(DOWN, float("inf")),
    "overflow": OVERFLOW,
}


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("name", ["evaluate", "sensitivity", "group", "calibrate", "distill", "run"])
def test_not_a_number(world: Path, tmp_path: Path, name: str, where: str) -> None:
    argv = [*arguments(name, world, tmp_path), *damaged(world, tmp_path, WHERE[where])]
    if "--plan" in argv:
        # Both blocks are grouped, so that `group` too meets the damage in the last one.
        write_plan(tmp_path / "model", tmp_path / "plan.json", blocks=[{"recovery": "hg+b2b"}] * 2)
        argv += ["--plan", tmp_path / "plan.json"]
    assert_one_line(command(*argv), "finite" if where == "overflow" else DOWN)
    assert not (tmp_path / "out.json").exists()
    assert not list(tmp_path.rglob("unit_0001*"))
    assert not (tmp_path / "out" / "export").exists()


@pytest.mark.parametrize("name", ["prepare", "export"])
def test_not_a_number_is_not_written_out(world: Path, tmp_path: Path, name: str) -> None:
    argv = [*arguments(name, world, tmp_path), *damaged(world, tmp_path, put(DOWN, float("nan")))]
    if "--plan" in argv:
        argv += ["--plan", write_plan(tmp_path / "model", tmp_path / "plan.json")]
    before = files(tmp_path)
    assert_one_line(command(*argv), DOWN)
    assert files(tmp_path) == before


# ---- ranks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sensitivity", "evaluate", "distill", "run"])
def test_ranks_that_fit_no_case(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """As the main one of three ranks that a launcher has started sees it."""
    for variable, value in {"RANK": "0", "WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(variable, value)
    assert_one_line(command(*arguments(name, world, tmp_path)), "M = 3 ranks")
    assert files(tmp_path) == {}


def test_ranks_that_fit_no_case_under_our_launcher(
    world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    outcome = command(*arguments("run", world, tmp_path), "--ranks", 3)
    assert_one_line(outcome, "M = 3 ranks cannot run a plan of G = 2 branches")
    assert capfd.readouterr().err == ""
    assert files(tmp_path) == {}


# ---- a full disk --------------------------------------------------------------------------------------------------


def test_no_space_for_an_export(world: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 60) as disk:
        argv = [*arguments("export", world, disk)]
        assert_one_line(command(*argv), "no space left on the device")
        assert files(disk) == {}


@pytest.mark.parametrize("kilobytes", [4, 40, 150, 250])
def test_no_space_for_a_run(world: Path, tmp_path: Path, kilobytes: int) -> None:
    """Wherever it stops, what is there is whole; with more space the same command ends as ever."""
    with small_disk(tmp_path / "disk", kilobytes) as disk:
        assert_one_line(command(*arguments("run", world, disk)), "no space left on the device")
        left = files(disk)
        assert not [name for name in left if name.endswith((".tmp", ".partial"))]
        assert "out/report/report.html" not in left
        for name, content in left.items():
            if name.endswith(".json"):
                json.loads(content)
        subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
        answer(*arguments("run", world, disk))
        assert files(disk / "out" / "export") == files(world / "run" / "export")


# ---- a process of its own -----------------------------------------------------------------------------------------


def test_nothing_but_the_line_is_printed(world: Path, tmp_path: Path) -> None:
    """Neither do the libraries that are loaded on the way have a say."""
    argv = [*arguments("evaluate", world, tmp_path), "--model", "nowhere"]
    program = [sys.executable, "-m", "megatron_spd.cli", *map(str, argv)]
    done = subprocess.run(program, capture_output=True, text=True)
    assert_one_line(Outcome(done.returncode, done.stdout, done.stderr), "no model folder at nowhere")
    assert done.stderr.count("\n") == 1
