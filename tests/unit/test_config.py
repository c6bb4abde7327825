"""Options from flags and files, and every mistake in them as one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeVar

import pytest

from megatron_spd.config import (
    COMMANDS,
    CurveOptions,
    DistillOptions,
    EvaluateOptions,
    PlanOptions,
    RunOptions,
    SensitivityOptions,
)
from megatron_spd.errors import UserError
from megatron_spd.options import CommonOptions
from megatron_spd.parsing import parse_options

T = TypeVar("T", bound=CommonOptions)
REQUIRED: dict[type[CommonOptions], list[str]] = {
    RunOptions: ["--model", "m", "--out", "o", "--branches", "3"],
    PlanOptions: ["--model", "m", "--out", "o", "--branches", "3", "--sensitivity", "s.json"],
    DistillOptions: ["--model", "m", "--plan", "p", "--out", "o"],
    EvaluateOptions: ["--model", "m"],
    SensitivityOptions: ["--model", "m", "--out", "o", "--branches", "3"],
    CurveOptions: ["--model", "m", "--out", "o", "--branches", "3"],
}


def parse(kind: type[T], *argv: str) -> T:
    return parse_options(kind, [*REQUIRED[kind], *argv], "megatron-spd test")


def message_of(kind: type[CommonOptions], *argv: str) -> str:
    with pytest.raises(UserError) as caught:
        parse(kind, *argv)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_flags() -> None:
    options = parse(
        RunOptions, "--drop-ratio", "0.7", "--seq_length=64", "--sync-points", "any", "--zero-stage", "1"
    )
    assert (options.model, options.branches, options.ranks) == ("m", 3, 1)
    assert (options.drop_ratio, options.seq_length) == (0.7, 64)
    assert (options.sync_points, options.zero_stage, options.json) == ("any", 1, False)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "options.yaml",
            "drop-ratio: 0.5\nlearning_rate: 1e-4\njson: true\nprompt_file: null\ntracking: none\n",
        ),
        (
            "options.json",
            json.dumps({"drop_ratio": 0.5, "learning_rate": 1e-4, "json": True, "tracking": "none"}),
        ),
    ],
)
def test_a_file_gives_defaults_that_flags_override(tmp_path: Path, name: str, text: str) -> None:
    file = tmp_path / name
    file.write_text(text.replace("prompt_file: null\n", "eval_data: null\n"))
    options = parse(RunOptions, "--config", str(file))
    assert (options.drop_ratio, options.learning_rate, options.json) == (0.5, 1e-4, True)
    assert (options.tracking, options.eval_data) == ("none", None)
    # Wherever the flag stands.
    for argv in (["--drop-ratio=0.25", f"--config={file}"], ["--config", str(file), "--drop-ratio", "0.25"]):
        assert parse(RunOptions, *argv).drop_ratio == 0.25


def test_a_file_can_hold_the_required_options(tmp_path: Path) -> None:
    file = tmp_path / "all.yaml"
    file.write_text("model: -strange name\n")
    assert parse_options(EvaluateOptions, ["--config", str(file)], "p").model == "-strange name"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("drop_rato: 0.5", "unknown key 'drop_rato'; did you mean drop_ratio?"),
        ("colour: red", "unknown key 'colour'; known are against,"),
        ("branches: three", "invalid int value: 'three'"),
        ("sync_points: all", "invalid choice: 'all'"),
        ("data: [a, b]", "key 'data' is list, expected a single value"),
        ("- 1", "holds list, expected option names with values"),
        ("a: [", "is neither YAML nor JSON"),
        ("seq_length: 1", "--seq-length is 1; it must be >= 2"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(text)
    kind = EvaluateOptions if "colour" in text else RunOptions
    assert message in message_of(kind, "--config", str(file))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert "no config file at" in message_of(RunOptions, "--config", str(tmp_path / "no.yaml"))


@pytest.mark.parametrize(
    ("kind", "argv", "message"),
    [
        (RunOptions, "--drop-ratoi 0.5", "unknown option '--drop-ratoi'; did you mean --drop-ratio?"),
        (RunOptions, "--drop 0.5", "unknown option '--drop'"),
        (RunOptions, "--config", "argument --config: expected one argument"),
        (RunOptions, "--drop-ratio 1.5", "--drop-ratio is 1.5; it must be between 0 and 1"),
        (RunOptions, "--drop-ratio nan", "--drop-ratio is nan; it must be between 0 and 1"),
        (RunOptions, "--branches 0", "--branches is 0; it must be >= 1"),
        (RunOptions, "--ranks -1", "--ranks is -1; it must be >= 1"),
        (RunOptions, "--learning-rate 0", "--learning-rate is 0.0; it must be > 0"),
        (PlanOptions, "--drop-ratio 0.5 --drop-count 3", "--drop-ratio and --drop-count exclude each other"),
        (PlanOptions, "--tau1 0.05", "--tau1 and --tau2 belong together"),
        (PlanOptions, "--tau1 5 --tau2 1", "--tau1 5.0 is above --tau2 1.0"),
        (DistillOptions, "--dtype bf16", "--dtype bf16 needs --zero-stage 1, 2 or 3"),
        (EvaluateOptions, "--dtype fp8", "invalid choice: 'fp8' (choose from 'fp32', 'bf16')"),
    ],
)
def test_a_wrong_flag_is_one_line(kind: type[CommonOptions], argv: str, message: str) -> None:
    assert message in message_of(kind, *argv.split())


def test_a_deepspeed_file_decides_about_bf16_itself() -> None:
    assert parse(DistillOptions, "--dtype", "bf16", "--deepspeed_config", "zero1_bf16.json").dtype == "bf16"


def test_launchers_pass_a_local_rank() -> None:
    assert parse(DistillOptions, "--local_rank=2").local_rank == 2


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shows_its_options(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_options(COMMANDS[command], ["--help"], command)
    assert caught.value.code == 0
    assert "--json" in capsys.readouterr().out


def test_ratios_and_variants_of_a_curve() -> None:
    options = parse(
        CurveOptions, "--ratios", "1, 0.5,0.50", "--variants", "all,shift", "--task-variants", "all"
    )
    assert options.ratio_values == [0.5, 1.0]
    assert options.variant_names == ["shift", "all"]
    assert options.task_variant_names == []
    with_tasks = parse(CurveOptions, "--variants", "all,shift", "--task-variants", "all", "--tasks", "t")
    assert with_tasks.task_variant_names == ["all"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--ratios", "0.5,much"], "expected numbers with commas between"),
        (["--ratios", "0,0.5"], "--ratios has 0; each must be above 0 and at most 1"),
        (["--ratios", "nan"], "--ratios has nan"),
        (["--ratios", ","], "need at least one value"),
        (["--variants", "zero-shot,magic"], "--variants has 'magic'; known are zero-shot, shift, heads"),
        (["--task-variants", "b2c"], "--task-variants has 'b2c'"),
        (["--finish", "none"], "leave finish out of --variants"),
        (["--limit", "5"], "--limit is for tasks"),
    ],
)
def test_mistakes_in_a_curve(argv: list[str], words: str) -> None:
    assert words in message_of(CurveOptions, *argv)


LIMITED = "--max-perplexity-increase 2% "


@pytest.mark.parametrize("kind", [PlanOptions, RunOptions])
def test_several_collectives(kind: type[PlanOptions | RunOptions]) -> None:
    options = parse(kind, *f"{LIMITED} --collectives int8:g128,full,int4,int8".split())
    assert options.formats == ["int8", "int4"]
    assert (options.optimize, options.kept_collectives) == (None, None)
    options = parse(
        kind, *f"{LIMITED} --collectives int8 --optimize latency --link-rate 1 --call-latency 0.2".split()
    )
    assert (options.optimize, options.link_rate, options.call_latency) == ("latency", 1.0, 0.2)
    assert parse(kind).formats == []
    paper = ["--recovery", "paper", "--sync-points", "attention"]
    assert parse(kind, *paper).sets_to_measure == 0
    assert parse(kind, *paper, *f"{LIMITED} --collectives int8".split()).sets_to_measure == 24


def test_collectives_to_measure() -> None:
    assert parse(SensitivityOptions, "--collectives", "int4/int8, int8").formats == ["int4/int8", "int8"]
    assert parse(SensitivityOptions).formats == []


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--collectives int8", "--collectives needs the accuracy to keep: give --max-perplexity-increase"),
        (LIMITED + "--collectives int9", "--collectives: collective 'int9': expected a low-bit format"),
        (LIMITED + "--collectives full", "--collectives is 'full'; expected at least one low-bit format"),
        (LIMITED + "--optimize bytes", "--optimize is for plans with several collectives"),
        (LIMITED + "--link-rate 1", "--link-rate is for plans with several collectives"),
        (
            LIMITED + "--collectives int8 --collective int8",
            "--collective and --collectives exclude each other",
        ),
        (LIMITED + "--collectives int8 --mlp-collective int8", "exclude each other"),
        (LIMITED + "--collectives int8 --optimize latency", "--optimize latency needs --link-rate"),
        (LIMITED + "--collectives int8 --optimize latency --link-rate 0", "needs --link-rate above 0"),
        (LIMITED + "--collectives int8 --optimize latency --link-rate nan", "needs --link-rate above 0"),
        (LIMITED + "--collectives int8 --link-rate 1", "--link-rate is for --optimize latency"),
        (
            LIMITED + "--collectives int8 --optimize bytes --ranks-served 3",
            "--ranks-served is for --optimize la",
        ),
        (LIMITED + "--collectives int8 --ranks-served 1", "--ranks-served is 1; it must be >= 2"),
        (LIMITED + "--collectives int8 --call-latency -1", "--call-latency is -1.0; it must be between"),
        (LIMITED + "--collectives int8 --optimize speed", "invalid choice: 'speed'"),
    ],
)
def test_mistakes_in_what_a_plan_may_choose(argv: str, words: str) -> None:
    assert words in message_of(PlanOptions, *argv.split())


def test_a_wrong_format_to_measure() -> None:
    assert "--collectives: collective 'int1'" in message_of(SensitivityOptions, "--collectives", "int8,int1")
