"""`megatron-spd bench` and `collectives` from the command line. (On shaped links: tests/distributed/test_link.py.)"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command_line import ERROR, answer, command
from tests.models import make_export, make_llama

ROOT = Path(__file__).parents[2]


def test_one_rank_communicates_nothing(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "m")
    export = make_export(folder, tmp_path / "x", 2, [0, 3], [(0, "mlp")])
    found = answer(
        *("bench", "--model", folder, "--out", tmp_path / "out", "--plans", export, "--drops", "none,2"),
        *("--batch-sizes", "1,2", "--prompt-lengths", "5,9", "--new-tokens", 3, "--rounds", 2),
    )
    assert list(found["variants"]) == ["plain", "2 of 6 dropped", "x", "no communication"]
    (link,) = found["links"]
    assert [(c["batch"], c["prompt"]) for c in link["cases"]] == [(1, 5), (1, 9), (2, 5), (2, 9)]
    for case in link["cases"]:
        for measured in case["variants"].values():
            for phase in measured.values():
                assert (phase["calls"], phase["num_bytes"], phase["saving"]["predicted"]) == (0, 0, 0.0)
                assert phase["seconds"]["median"] > 0
    assert json.loads((tmp_path / "out/bench.json").read_text())["links"] == found["links"]
    assert all(Path(path).is_file() for path in found["paths"].values())


def test_the_tool_runs_two_ranks(tmp_path: Path) -> None:
    """Through the launcher, an export as the model."""
    export = make_export(make_llama(tmp_path / "m"), tmp_path / "x", 2, [0, 3])
    line = [
        sys.executable,
        "tools/benchmark_latency.py",
        "--model",
        str(export),
        "--out",
        str(tmp_path / "out"),
    ]
    line += ["--ranks", "2", "--prompt-lengths", "8", "--new-tokens", "3", "--rounds", "2", "--drops", "none"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "M = 2 ranks over gloo" in done.stdout
    (plain, export_line) = (
        next(words for words in map(str.split, done.stdout.splitlines()) if words[:1] == [name])
        for name in ("plain", "x")
    )
    assert (plain[1], export_line[1]) == ("6", "4")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--drops", "9"], "--drops has '9'"),
        (["--drops", ","], "--drops and --collectives need at least one value each"),
        (["--collectives", "int99"], "int99"),
        (["--batch-sizes", "0"], "--batch-sizes is '0'; expected whole numbers above 0"),
        (["--prompt-lengths", "1,x"], "--prompt-lengths is '1,x'"),
        (["--link-rates", "fast"], "--link-rates is 'fast'; expected numbers above 0"),
        (["--ranks-per-node", "2"], "give --link-rates as well"),
        (
            ["--ranks", "4", "--ranks-per-node", "3", "--link-rates", "1"],
            "--ranks-per-node 3 makes no two or more equal nodes of --ranks 4",
        ),
        (["--new-tokens", "1"], "--new-tokens is 1; it must be >= 2"),
        (["--branches", "4"], "G = 4 branches do not divide"),
        (["--plans", "nowhere.json"], "no plan at nowhere.json"),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path: Path, wrong: list[str], said: str) -> None:
    folder = make_llama(tmp_path / "m")
    outcome = command("bench", "--model", folder, "--out", tmp_path / "out", *wrong)
    assert outcome.code == 2
    assert said in outcome.err
    assert outcome.err.startswith(ERROR)
    assert len(outcome.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--ranks", "1"], "collectives need ranks to run between: give --ranks 2 or more"),
        (["--messages", "4G"], "--messages is '4G'; expected bytes like 500, 16k or 4M"),
        (["--messages", ","], "--messages is empty"),
        (["--formats", "int8,full"], "collective 'full'"),
        (["--repeats", "0"], "--repeats is 0; expected a number above 0"),
        (["--link-rates", "-1"], "--link-rates is '-1'; expected numbers above 0"),
    ],
)
def test_mistakes_of_collectives(tmp_path: Path, wrong: list[str], said: str) -> None:
    outcome = command("collectives", "--out", tmp_path / "out.json", *wrong)
    assert (outcome.code, len(outcome.err.splitlines())) == (2, 1)
    assert said in outcome.err
    assert not any(tmp_path.iterdir())
