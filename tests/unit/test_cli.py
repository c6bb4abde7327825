"""What all commands share (results, errors, exit codes), with commands made for the test in place of the real ones."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import megatron_spd
from megatron_spd import cli
from megatron_spd.config import COMMANDS, EvaluateOptions
from megatron_spd.errors import RankDied, UserError
from megatron_spd.runtime import launch as launch_module
from megatron_spd.runtime.launch import RankFailed

ROOT = Path(__file__).parents[2]
ARGV = ["evaluate", "--model", "folder"]
Command = Callable[[EvaluateOptions], dict[str, Any]]


@pytest.fixture
def evaluate(monkeypatch: pytest.MonkeyPatch) -> Callable[[Command], None]:
    """Puts a function in place of the command ``evaluate``."""

    def put(command: Command) -> None:
        module = types.ModuleType("megatron_spd.commands")
        module.evaluate = command  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "megatron_spd.commands", module)
        monkeypatch.setattr(megatron_spd, "commands", module, raising=False)

    return put


def raising(error: BaseException) -> Command:
    def command(_: EvaluateOptions) -> dict[str, Any]:
        raise error

    return command


def test_options_reach_the_command_and_text_is_printed(
    evaluate: Callable[[Command], None], capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(lambda options: {"text": f"{options.model} {options.sequences}", "perplexity": 2.0})
    assert cli.main([*ARGV, "--sequences", "3"]) == 0
    assert capsys.readouterr().out == "folder 3\n"


def test_json_is_one_strict_object_on_the_last_line(
    evaluate: Callable[[Command], None], capsys: pytest.CaptureFixture[str]
) -> None:
    def command(_: EvaluateOptions) -> dict[str, Any]:
        print("something a library says")
        return {"text": "table", "perplexity": math.inf, "paths": {1: Path("a/b")}, "points": (1, 2.5)}

    evaluate(command)
    assert cli.main([*ARGV, "--json"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert json.loads(last) == {"perplexity": None, "paths": {"1": "a/b"}, "points": [1, 2.5]}


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("no model\nat x"), 2, "no model at x"),
        (RankDied("rank 1 died"), 2, "rank 1 died"),
        (
            OSError(28, "No space left on device", "out/x"),
            2,
            "no space left on the device at out/x; free some space",
        ),
        (
            PermissionError(13, "Permission denied", "/root/x"),
            2,
            "Permission denied at /root/x; choose a path",
        ),
    ],
)
def test_what_the_user_can_mend_is_one_line(
    evaluate: Callable[[Command], None],
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    code: int,
    line: str,
) -> None:
    evaluate(raising(error))
    assert cli.main(ARGV) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"megatron-spd: error: {line}")
    assert err.count("\n") == 1


def test_a_full_disk_behind_another_error_is_the_users(
    evaluate: Callable[[Command], None], capsys: pytest.CaptureFixture[str]
) -> None:
    def command(_: EvaluateOptions) -> dict[str, Any]:
        try:
            with open("/dev/full", "w") as file:
                file.write("x" * 100_000)
        except OSError as error:
            raise RuntimeError("could not save") from error
        return {}

    evaluate(command)
    assert cli.main(ARGV) == 2
    assert "no space left on the device" in capsys.readouterr().err


def test_a_defect_keeps_its_traceback(
    evaluate: Callable[[Command], None], capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(raising(KeyError("lost")))
    assert cli.main(ARGV) == 1
    err = capsys.readouterr().err
    assert "Traceback (most recent call last)" in err
    assert err.splitlines()[-1] == "megatron-spd: error: 'lost'"


def test_a_defect_in_a_rank_shows_the_ranks_traceback(
    evaluate: Callable[[Command], None], capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(raising(RankFailed("rank 2 failed: KeyError: 'lost'", "Traceback of rank 2\n")))
    assert cli.main(ARGV) == 1
    expected = "Traceback of rank 2\nmegatron-spd: error: rank 2 failed: KeyError: 'lost'\n"
    assert capsys.readouterr().err == expected


def test_debug_shows_the_traceback_of_a_user_error(
    evaluate: Callable[[Command], None], capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(raising(UserError("no model")))
    assert cli.main([*ARGV, "--debug"]) == 2
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_interruption(evaluate: Callable[[Command], None], capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(raising(KeyboardInterrupt()))
    assert cli.main(ARGV) == 130
    assert capsys.readouterr().err == "megatron-spd: interrupted\n"


def test_a_wrong_command_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evalute"]) == 2
    assert capsys.readouterr().err.startswith(
        "megatron-spd: error: unknown command 'evalute'; the commands are prep"
    )


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_usage_lists_every_command(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 0
    listed = {line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")}
    assert listed == set(COMMANDS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"megatron-spd {megatron_spd.__version__}\n"


def test_several_ranks_go_through_the_launcher_with_the_same_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    def launch(argv: list[str], ranks: int) -> dict[str, Any]:
        calls.append((argv, ranks))
        return {"text": "from rank 0"}

    monkeypatch.setattr(launch_module, "launch", launch)
    assert cli.main([*ARGV, "--ranks", "3"]) == 0
    assert calls == [([*ARGV, "--ranks", "3"], 3)]
    assert capsys.readouterr().out == "from rank 0\n"


def test_a_foreign_launchers_ranks_count(
    evaluate: Callable[[Command], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under torchrun no other ranks are started, and only rank 0 prints."""
    evaluate(lambda options: {"text": f"ranks {options.ranks}"})
    monkeypatch.setenv("WORLD_SIZE", "4")
    for rank, out in (("0", "ranks 4\n"), ("3", "")):
        monkeypatch.setenv("RANK", rank)
        assert cli.main(ARGV) == 0
        assert capsys.readouterr().out == out
    monkeypatch.setenv("RANK", "0")
    assert cli.main([*ARGV, "--ranks", "3"]) == 2
    assert "--ranks is 3, but the launcher started 4" in capsys.readouterr().err


def test_a_cpu_rank_of_a_launcher_sees_no_cuda(
    evaluate: Callable[[Command], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate(lambda _: {"cuda": os.environ["CUDA_VISIBLE_DEVICES"]})
    for name, value in {"RANK": "0", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "0,1,2"}.items():
        monkeypatch.setenv(name, value)
    assert cli.main(ARGV) == 0
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


def test_a_wrong_command_line_needs_no_torch() -> None:
    """The first answer comes before anything heavy is imported."""
    code = "import sys, megatron_spd.cli as c; c.main(['x']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT).returncode == 0


@pytest.mark.parametrize(
    ("script", "command"),
    [
        ("measure_sensitivity", "sensitivity"),
        ("make_plan", "plan"),
        ("distill", "distill"),
        ("export_spd", "export"),
        ("evaluate", "evaluate"),
        ("convert", "convert"),
    ],
)
def test_tools_are_the_commands(script: str, command: str, tmp_path: Path) -> None:
    """From any current folder, with the command's own message and exit code."""
    program = [sys.executable, str(ROOT / "tools" / f"{script}.py")]
    done = subprocess.run([*program, "--nonsense"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("megatron-spd: error: the following arguments are required: --")
    assert f"megatron-spd {command} --help" in done.stderr
