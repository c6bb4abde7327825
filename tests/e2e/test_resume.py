"""What was killed goes on with the same command and ends with the same bytes."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import psutil
import pytest
import torch
from torch import Tensor

from megatron_spd import cli
from megatron_spd.calibration.stream import BlockStreamer
from megatron_spd.checkpoint.hf import CheckpointReader
from megatron_spd.checkpoint.safetensors_io import ShardWriter
from megatron_spd.distill import checkpoints, loop, units
from megatron_spd.runtime.distributed import initialize
from megatron_spd.sensitivity import sweep as sweep_module
from megatron_spd.sensitivity.measure import SetMeasurer
from tests.command_line import ERROR, answer, files
from tests.e2e.full_run import make_world
from tests.e2e.full_run import run_arguments as full_arguments
from tests.models import make_llama, tiny_text
from tests.ranks import run_ranks

LAYERS, BRANCHES = 4, 2
DATA = ["--sequences", 4, "--seq-length", 16]
#: The paper's chain; the other stages are those of the second part below.
PAPER = ["--sync-points", "attention", "--recovery", "paper"]
#: Every dropped block is distilled and none grouped (a random model's perplexities are huge).
TIERS = ["--tau1", -1_000_000_000, "--tau2", 1_000_000_000]
TRAINING = ["--micro-batch-size", 1, "--learning-rate", 1e-3]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a text, and the export of an uninterrupted run in ``whole``."""
    folder = tmp_path_factory.mktemp("work")
    make_llama(folder / "model", heads=4, kv=4, layers=LAYERS)
    (folder / "text").write_text(tiny_text(), encoding="utf-8")
    answer(*run_arguments(folder, folder / "whole"))
    return folder


def run_arguments(work: Path, out: Path) -> list[object]:
    """`run` with three units to distil, 14 steps each."""
    fixed = [
        "run",
        "--model",
        work / "model",
        "--out",
        out,
        "--branches",
        BRANCHES,
        "--data",
        work / "text",
        *DATA,
    ]
    sizes = ["--eval-sequences", 2, "--distill-sequences", 8, "--epochs", 2]
    return [*fixed, *sizes, "--drop-ratio", 0.7, *TIERS, *PAPER, *TRAINING, "--tracking", "none"]


# ---- a run, killed ------------------------------------------------------------------------------------------------


def kill_self(*_: object, **__: object) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("still alive")


def on_call(number: int, function: Callable[..., Any], then: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` that runs ``then`` instead on its ``number``-th call (from 1)."""
    calls = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return (then if calls == number else function)(*args, **kwargs)

    return counted


def and_die(function: Callable[..., object]) -> Callable[..., NoReturn]:
    """``function``, and then the end."""

    def last(*args: Any, **kwargs: Any) -> NoReturn:
        function(*args, **kwargs)
        kill_self()

    return last


def _in_the_middle_of_the_second_unit() -> None:
    loop.TrainingLoop._step = on_call(14 + 6, loop.TrainingLoop._step, kill_self)  # type: ignore[method-assign]


def _between_units() -> None:
    units.UnitStore.save = and_die(units.UnitStore.save)  # type: ignore[method-assign]


def _between_a_units_weights_and_its_record() -> None:
    # The first text is the store's identity, the second the first unit's record, the third the second unit's.
    units.write_text_atomic = on_call(3, units.write_text_atomic, kill_self)  # type: ignore[attr-defined]


def _before_the_export_has_its_name() -> None:
    ShardWriter.close = kill_self  # type: ignore[method-assign]


#: Where the process kills itself, and the units that are finished by then.
PLACES: dict[Callable[[], None], int] = {
    _in_the_middle_of_the_second_unit: 1,
    _between_units: 1,
    _between_a_units_weights_and_its_record: 1,
    _before_the_export_has_its_name: 3,
}


def run_until_killed(place: Callable[[], None], argv: list[str]) -> None:
    """Runs in a process of its own."""
    place()
    cli.main(argv)


def kill_at(place: Callable[[], None], argv: list[str]) -> None:
    """Start `megatron-spd ARGV`, which must get to ``place`` and die there."""
    process = multiprocessing.get_context("forkserver").Process(target=run_until_killed, args=(place, argv))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__.strip("_"))
def test_a_killed_run_ends_with_the_same_bytes(work: Path, tmp_path: Path, place: Callable[[], None]) -> None:
    argv = [str(a) for a in run_arguments(work, tmp_path / "run")]
    kill_at(place, argv)
    distilled = tmp_path / "run" / "distill"
    finished = sorted(distilled.glob("unit_*.json"))
    assert len(finished) == PLACES[place]
    assert not (tmp_path / "run" / "export").exists()
    kept = [p for record in finished for p in (record, record.with_suffix(".safetensors"))]
    before = [(p.stat().st_ino, p.stat().st_mtime_ns) for p in kept]

    answer(*argv)
    # A unit trained again would have been written again.
    assert [(p.stat().st_ino, p.stat().st_mtime_ns) for p in kept] == before
    assert len(list(distilled.glob("unit_*.json"))) == 3
    assert files(tmp_path / "run" / "export") == files(work / "whole" / "export")
    assert {p.name for p in (tmp_path / "run").iterdir()} == {p.name for p in (work / "whole").iterdir()}


# ---- a full recovery, killed --------------------------------------------------------------------------------------


#: The three points that go first make a unit of two blocks and one of one.
TWO_UNITS = ["--drop-count", 3]


@pytest.fixture(scope="module")
def full_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained model, a text, and the export of an uninterrupted full recovery in ``whole``."""
    folder = make_world(tmp_path_factory.mktemp("full"))
    answer(*full_arguments(folder, folder / "whole", *TWO_UNITS))
    assert len(list((folder / "whole" / "calibrated").glob("unit_*.json"))) == 2
    return folder


def _while_sweeping_grouped() -> None:
    sweep_module._SAVE_EVERY = 0.0
    sweep_module._save = on_call(2, sweep_module._save, and_die(sweep_module._save))  # type: ignore[assignment]


def _in_the_search() -> None:
    # The first set is the empty one, for the plain model.
    measure = SetMeasurer.__call__
    SetMeasurer.__call__ = on_call(3, measure, kill_self)  # type: ignore[method-assign]


def _between_calibrated_units() -> None:
    units.UnitStore.save = and_die(units.UnitStore.save)  # type: ignore[method-assign]


def _between_a_calibrated_units_weights_and_its_record() -> None:
    # The first text is the store's identity, the others are records of units.
    units.write_text_atomic = on_call(3, units.write_text_atomic, kill_self)  # type: ignore[attr-defined]


def _in_the_finishing_pass() -> None:
    checkpoints._SAVE_EVERY, checkpoints._COST = 0.0, 0.0
    save = checkpoints.Checkpoints.save
    checkpoints.Checkpoints.save = on_call(2, save, and_die(save))  # type: ignore[method-assign]


#: Where the process kills itself, a file that is there then, and one that is not yet.
FULL_PLACES: dict[Callable[[], None], tuple[str, str]] = {
    _while_sweeping_grouped: ("sensitivity.unfinished", "sensitivity.json"),
    _in_the_search: ("search.json", "stages/plan.json"),
    _between_calibrated_units: ("calibrated/unit_*.json", "stages/group.json"),
    _between_a_calibrated_units_weights_and_its_record: ("calibrated/unit_*.json", "stages/group.json"),
    _in_the_finishing_pass: ("finish/unfinished/latest.json", "finish/record.json"),
}


@pytest.mark.parametrize("place", FULL_PLACES, ids=lambda place: place.__name__.strip("_"))
def test_a_killed_full_recovery_ends_with_the_same_bytes(
    full_world: Path, tmp_path: Path, place: Callable[[], None]
) -> None:
    out, whole = tmp_path / "run", full_world / "whole"
    argv = [str(a) for a in full_arguments(full_world, out, *TWO_UNITS)]
    kill_at(place, argv)
    there, not_yet = FULL_PLACES[place]
    (held,) = out.glob(there)
    assert not (out / not_yet).exists()
    before = held.stat().st_ino

    answer(*argv)
    if held.parent.name == "calibrated":
        assert held.stat().st_ino == before  # a unit calibrated again would have been written again
    assert files(out / "export") == files(whole / "export")
    assert files(out / "calibrated") == files(whole / "calibrated")
    assert {p.name for p in out.iterdir()} == {p.name for p in whole.iterdir()}


# ---- a rank, killed -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def started(argv: list[object]) -> Iterator[subprocess.Popen[str]]:
    """`megatron-spd ARGV` as a process; it and its children are gone at the end."""
    program = [sys.executable, "-m", "megatron_spd.cli", *map(str, argv)]
    with subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
            for member in (*family, process):
                with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                    member.kill()


def rank_processes(parent: int) -> dict[int, psutil.Process]:
    """The ranks below a launching process."""
    found = {}
    for process in psutil.Process(parent).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            rank = process.environ().get("RANK")
            if rank is not None:
                found[int(rank)] = process
    return found


def test_a_rank_killed_while_distilling_is_named_and_the_command_goes_on(work: Path, tmp_path: Path) -> None:
    argv: list[object] = ["distill", "--model", work / "model", "--plan", work / "whole" / "plan.json"]
    argv += ["--data", work / "text", "--sequences", 8, "--seq-length", 16, "--out", tmp_path / "d"]
    argv += ["--epochs", 30, *TRAINING, "--tracking", "none"]
    with started([*argv, "--ranks", 2]) as process:
        deadline = time.monotonic() + 300
        while not (finished := list((tmp_path / "d" / "distill").glob("unit_*.json"))):
            assert process.poll() is None
            assert time.monotonic() < deadline, "no unit was finished"
            time.sleep(0.02)
        ranks = rank_processes(process.pid)
        assert sorted(ranks) == [0, 1]
        ranks[1].kill()
        killed = time.monotonic()
        _, errors = process.communicate(timeout=60)
        took = time.monotonic() - killed
    assert process.returncode == 2
    assert took < 15
    assert not any(r.is_running() and r.status() != psutil.STATUS_ZOMBIE for r in ranks.values())
    (line,) = [e for e in errors.splitlines() if e.startswith(ERROR)]
    assert line.startswith(f"{ERROR}rank 1 died")
    assert "Run the same command again" in line
    assert "Traceback" not in errors

    before = [(p.stat().st_ino, p.stat().st_mtime_ns) for p in finished]
    assert len(answer(*argv)["units"]) == 3
    assert [(p.stat().st_ino, p.stat().st_mtime_ns) for p in finished] == before


# ---- a sweep, killed ----------------------------------------------------------------------------------------------


class Interrupted(Exception):
    """In place of a kill, where the process must go on to answer."""


def swept(
    folder: Path,
    unfinished: Path | None,
    stop_at: int | None = None,
    seed: int = 1,
    collectives: Sequence[str] = (),
) -> tuple[Any, list[int]]:
    """A sweep that saves after every block: its result (None if interrupted in front of block ``stop_at``), and the
    blocks whose weights were read."""
    sweep_module._SAVE_EVERY = 0.0
    reader = CheckpointReader(folder)
    read: list[int] = []

    def weights(block: int) -> dict[str, Tensor]:
        if block == stop_at:
            raise Interrupted
        read.append(block)
        return reader.block(block)

    streamer = BlockStreamer(reader, initialize(), torch.float32, weights, micro_batch=2)
    tokens = torch.randint(3, 300, (4, 12), generator=torch.Generator().manual_seed(seed))
    try:
        result = sweep_module.sweep(
            streamer, tokens, BRANCHES, unfinished=unfinished, collectives=collectives
        )
        return result, read
    except Interrupted:
        return None, read


@pytest.mark.parametrize(("first", "then"), [(1, 1), (2, 2), (2, 1), (1, 2), (4, 1), (1, 4)])
def test_an_interrupted_sweep_goes_on_under_any_number_of_ranks(
    work: Path, tmp_path: Path, first: int, then: int
) -> None:
    saved = tmp_path / "unfinished"
    # In front of block 2, one candidate's sums are pending (the MLP point of block 1), split over the ranks.
    assert run_ranks(first, swept, work / "model", saved, 2)[0] == (None, [0, 1])
    assert saved.is_file()
    result, read = run_ranks(then, swept, work / "model", saved)[0]
    assert read == [2, 3]
    assert not saved.exists()
    whole, _ = run_ranks(then, swept, work / "model", None)[0]
    if first == then:
        assert result == whole
    for method in ("algorithm1", "single"):
        found, expected = ([e["perplexity"] for e in r[method]] for r in (result, whole))
        assert found == pytest.approx(expected, rel=1e-5)


def test_an_interrupted_sweep_of_another_text_is_not_continued(work: Path, tmp_path: Path) -> None:
    saved = tmp_path / "unfinished"
    run_ranks(1, swept, work / "model", saved, 2)
    result, read = run_ranks(1, swept, work / "model", saved, None, 2)[0]
    assert read == [0, 1, 2, 3]
    assert json.dumps(result) == json.dumps(run_ranks(1, swept, work / "model", None, None, 2)[0][0])


def test_an_interrupted_sweep_of_low_bit_points_goes_on(work: Path, tmp_path: Path) -> None:
    saved, formats = tmp_path / "unfinished", ("int8", "int3")
    assert run_ranks(1, swept, work / "model", saved, 3, 1, formats)[0] == (None, [0, 1, 2])
    result, read = run_ranks(1, swept, work / "model", saved, None, 1, formats)[0]
    assert read == [3]
    assert result == run_ranks(1, swept, work / "model", None, None, 1, formats)[0][0]
    assert len(result["low_bit"]) == 2 * 2 * LAYERS


@pytest.mark.parametrize("others", [(), ("int8",), ("int3", "int8")])
def test_an_interrupted_sweep_of_other_formats_is_not_continued(
    work: Path, tmp_path: Path, others: tuple[str, ...]
) -> None:
    saved, formats = tmp_path / "unfinished", ("int8", "int3")
    run_ranks(1, swept, work / "model", saved, 2, 1, others)
    assert run_ranks(1, swept, work / "model", saved, None, 1, formats)[0][1] == [0, 1, 2, 3]


def test_an_unfinished_sweep_of_an_older_version_is_not_continued(work: Path, tmp_path: Path) -> None:
    """Its file has no low-bit streams, and an identity that says nothing of formats."""
    saved = tmp_path / "unfinished"
    run_ranks(1, swept, work / "model", saved, 2)
    identity, *streams = torch.load(saved, weights_only=True)
    torch.save((identity[::-1], *streams[:-1]), saved)
    assert run_ranks(1, swept, work / "model", saved)[0][1] == [0, 1, 2, 3]
