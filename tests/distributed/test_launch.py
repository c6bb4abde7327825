"""The deepspeed launcher with real rank processes: results, errors and deaths come back, and nobody is left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from megatron_spd.checkpoint.hf import CheckpointReader
from megatron_spd.errors import RankDied, UserError
from megatron_spd.plan import SPDPlan
from megatron_spd.runtime.launch import RankFailed, free_port, launch
from tests.command_line import answer
from tests.models import make_llama

ROOT = Path(__file__).parents[2]
PROGRAM = "tests.distributed.rank_program"
RANKS = 3


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks import tests.distributed.rank_program from the current folder."""
    monkeypatch.chdir(ROOT)


@pytest.fixture
def pids(tmp_path: Path) -> Iterator[Path]:
    """The folder of the ranks' pid files; no rank may be left when the test ends."""
    yield tmp_path
    left = [pid for pid in known_pids(tmp_path) if runs(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


def known_pids(folder: Path) -> list[int]:
    return [int(p.read_text()) for p in sorted(folder.glob("*.pid"))]


def runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


def wait_for_ranks(folder: Path, limit: float = 90.0) -> list[int]:
    deadline = time.monotonic() + limit
    while len(known_pids(folder)) < RANKS:
        assert time.monotonic() < deadline, "the ranks did not start"
        time.sleep(0.05)
    return known_pids(folder)


def wait_until_gone(pids: list[int], limit: float) -> None:
    deadline = time.monotonic() + limit
    while any(runs(pid) for pid in pids):
        assert time.monotonic() < deadline, f"still running after {limit} s: {[p for p in pids if runs(p)]}"
        time.sleep(0.05)


def test_result_of_rank_0_comes_back(pids: Path, capfd: pytest.CaptureFixture[str]) -> None:
    result = launch(["sum", str(pids)], RANKS, PROGRAM)
    assert (result["sum"], result["world"]) == (6.0, RANKS)
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("this goes to standard error") == RANKS
    assert len(known_pids(pids)) == RANKS


def test_user_error_of_one_rank_is_raised_here(pids: Path) -> None:
    with pytest.raises(UserError, match=r"^G = 4 branches do not divide 3 groups$"):
        launch(["user error", str(pids)], RANKS, PROGRAM)


def test_full_disk_in_one_rank_is_a_user_error(pids: Path) -> None:
    with pytest.raises(UserError, match="no space left on the device"):
        launch(["full disk", str(pids)], RANKS, PROGRAM)


def test_defect_names_the_rank_and_carries_its_traceback(pids: Path) -> None:
    with pytest.raises(RankFailed, match=r"^rank 1 failed: KeyError: 'lost'$") as caught:
        launch(["defect", str(pids)], RANKS, PROGRAM)
    assert 'raise KeyError("lost")' in caught.value.trace


@pytest.mark.parametrize("case", ["sleep", "collective"])
def test_killed_rank_is_named_within_seconds(pids: Path, case: str) -> None:
    """Also when its peers wait for it in a collective and get errors of their own."""
    killed_at: list[float] = []

    def kill_rank_1() -> None:
        ranks = wait_for_ranks(pids)
        killed_at.append(time.monotonic())
        os.kill(ranks[1], signal.SIGKILL)

    killer = threading.Thread(target=kill_rank_1)
    killer.start()
    with pytest.raises(RankDied, match=r"^rank 1 died"):
        launch([case, str(pids)], RANKS, PROGRAM)
    took = time.monotonic() - killed_at[0]
    killer.join()
    assert took < 5.0
    assert not any(runs(pid) for pid in known_pids(pids))


@pytest.mark.parametrize(
    ("sent", "code"),
    [(signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGINT, None), (signal.SIGKILL, -signal.SIGKILL)],
)
def test_no_rank_outlives_the_launching_process(pids: Path, sent: signal.Signals, code: int | None) -> None:
    # A shell's background job ignores SIGINT, and so would its children.
    script = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from megatron_spd.runtime.launch import launch\n"
        f"launch(['sleep', {str(pids)!r}], {RANKS}, {PROGRAM!r})"
    )
    with subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL) as parent:
        ranks = wait_for_ranks(pids)
        family = psutil.Process(parent.pid).children(recursive=True)
        parent.send_signal(sent)
        wait_until_gone([*ranks, *(p.pid for p in family)], 10.0)
        parent.wait(10.0)
    assert code is None or parent.returncode == code


def test_rank_that_never_begins_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RankDied, match="ranks 0, 1 ended before the work began"):
        launch([], 2, "tests.distributed.no_such_module")


def test_wrong_options_under_the_launcher_are_one_line(tmp_path: Path) -> None:
    """As launch/distill.sh starts it: rank 0 speaks for all, and its exit code comes out."""
    launcher = [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--quiet",
        "--num_accelerators",
        str(RANKS),
    ]
    command = [
        *launcher,
        "--master_port",
        str(free_port()),
        str(ROOT / "tools" / "distill.py"),
        "--nonsense",
        "1",
    ]
    env = os.environ | {"DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 2
    assert (
        done.stderr.count("megatron-spd: error: the following arguments are required: --model, --plan, --out")
        == 1
    )


def test_two_nodes_of_a_hostfile(tmp_path: Path) -> None:
    """launch/distill.sh started on each of two nodes, which are this machine twice, a rank on each."""
    model = make_llama(tmp_path / "model", heads=4, kv=4)
    plan = SPDPlan.dense(CheckpointReader(model).base_model(), 2).with_drops([0])
    plan.with_block(0, tier="SB", recovery="b2b").save(tmp_path / "plan.json")
    # The scripts beside an environment that is there already.
    root = tmp_path / "project"
    for name in ("launch/distill.sh", "tools/distill.py"):
        (root / name).parent.mkdir(parents=True)
        shutil.copy(ROOT / name, root / name)
    (root / "launch" / "env.sh").write_text("exit 0\n")
    (tmp_path / "hosts").write_text("first slots=1\nsecond slots=1\n")
    given = ["--model", model, "--plan", tmp_path / "plan.json", "--sequences", 4, "--seq-length", 16]
    given += ["--epochs", 2, "--micro-batch-size", 1, "--tracking", "none"]
    environment = os.environ | {
        "HOSTFILE": str(tmp_path / "hosts"),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    script = ["bash", str(root / "launch" / "distill.sh"), *map(str, given), "--json", "--out"]
    nodes = [
        subprocess.Popen(
            [*script, str(tmp_path / "out")],
            env=environment | {"NODE_RANK": str(node)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for node in (0, 1)
    ]
    (first, errors), (second, more_errors) = (node.communicate(timeout=300) for node in nodes)
    assert [node.returncode for node in nodes] == [0, 0], errors + more_errors
    (line,) = first.splitlines()  # of rank 0 alone
    assert second == ""
    (unit,) = json.loads(line)["units"]
    (alone,) = answer("distill", *given, "--out", tmp_path / "alone")["units"]
    assert unit["losses"] == pytest.approx(alone["losses"], rel=1e-3)
