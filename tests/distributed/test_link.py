"""Ranks behind links of a set speed: the speed is real, and nothing stays behind, however the run ends."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from megatron_spd.latency.bounds import bytes_sent
from tests.command_line import answer, command
from tests.models import make_llama

ROOT = Path(__file__).parents[2]
RANKS = 2


#: Leaves the network and shapes a link, as a rank does.
_TRIAL = """
import ctypes, subprocess
assert ctypes.CDLL(None).unshare(0x40000000) == 0, "unshare"
shape = "tc qdisc add dev lo root tbf rate 1gbit burst 20000 latency 50ms"
subprocess.run(shape.split(), check=True)
"""


def why_not() -> str:
    """Why links cannot be shaped here; empty where they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if missing := [tool for tool in ("ip", "tc") if shutil.which(tool) is None]:
        return f"no {' and no '.join(missing)} here (iproute2)"
    done = subprocess.run([sys.executable, "-c", _TRIAL], capture_output=True, text=True)
    return (
        "" if done.returncode == 0 else f"no network namespaces or no shaper: {done.stderr.splitlines()[-1]}"
    )


REASON = why_not()
pytestmark = pytest.mark.skipif(bool(REASON), reason=REASON)


def arguments(folder: Path, out: Path, rates: str, rounds: int = 2) -> list[str]:
    return [
        *("bench", "--model", str(folder), "--out", str(out), "--ranks", str(RANKS)),
        *("--link-rates", rates, "--prompt-lengths", "64", "--new-tokens", "3", "--rounds", str(rounds)),
    ]


def interfaces() -> str:
    return subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True).stdout


def outside(folder: Path) -> dict[int, int]:
    """The network namespace (inode) of every process that has ``folder`` on its command line and is not in ours."""
    own, found = os.stat("/proc/self/ns/net").st_ino, {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if str(folder) in " ".join(process.cmdline()):
                inode = os.stat(f"/proc/{process.pid}/ns/net").st_ino
                if inode != own:
                    found[process.pid] = inode
    return found


def wait_until(condition: Callable[[], bool], limit: float, otherwise: str) -> None:
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.05)


@pytest.mark.timeout(600)  # ranks that start on a busy machine
def test_bench_on_links_of_two_speeds(tmp_path: Path) -> None:
    # Messages of 64 x 192 x 4 = 49 kB: at 50 Mbit/s each all-reduce takes 8 ms, far more than its fixed cost.
    folder = make_llama(tmp_path / "m", hidden=192, heads=4, kv=2, ffn=96)
    before = interfaces()
    result = answer(*arguments(folder, tmp_path / "out", "0.2,0.05"))
    assert interfaces() == before

    fast, slow = result["links"]
    assert (fast["gigabits"], slow["gigabits"]) == (0.2, 0.05)
    for link in (fast, slow):
        # Headers and acknowledgements take a little; the shaper lets no more through than it is told.
        assert 0.5 < link["bytes_per_second"] / link["nominal"] < 1.05
        variants = link["cases"][0]["variants"]
        assert [variants[name]["first_token"]["calls"] for name in result["variants"]] == [6, 3, 0]
    plain, limit = (slow["cases"][0]["variants"][n]["first_token"] for n in ("plain", "no communication"))
    sent = bytes_sent("all_reduce", 64 * 192 * 4, RANKS) * 6
    assert plain["sent"] == pytest.approx(sent)
    # On a busy machine the shaper saves up its bucket, a third of a message, in front of every one.
    assert plain["seconds"]["median"] > 0.5 * sent / slow["nominal"]
    assert limit["saving"]["bound"] == pytest.approx(sent / slow["nominal"])
    assert {"bench.json", "bench.md", "bench.png"} <= {p.name for p in (tmp_path / "out").iterdir()}


@pytest.mark.timeout(600)  # four ranks that start on a busy machine
def test_two_nodes_of_two_ranks(tmp_path: Path) -> None:
    """What is summed inside a branch, on one node, does not go over the slow link."""
    folder = make_llama(tmp_path / "m", hidden=192, heads=4, kv=4, ffn=96)
    before = interfaces()
    line = [
        *arguments(folder, tmp_path / "out", "0.05"),
        "--ranks",
        4,
        "--branches",
        2,
        "--ranks-per-node",
        2,
    ]
    result = answer(*line, "--drops", "5")
    assert interfaces() == before
    assert (result["ranks"], result["ranks_per_node"]) == (4, 2)
    link = result["links"][0]
    inside = link["inside"]["2"]["bytes_per_second"]
    assert inside > 3 * link["nominal"] > 3 * 0.5 * link["bytes_per_second"]
    plain, dropped = (link["cases"][0]["variants"][n]["first_token"] for n in ("plain", "5 of 6 dropped"))
    assert (plain["calls"], plain["inside_calls"]) == (6, 0)
    assert (dropped["calls"], dropped["inside_calls"]) == (1, 5)
    # Five messages of 49 kB, 1.5 times each, at 50 Mbit/s are 59 ms.
    assert dropped["seconds"]["median"] < plain["seconds"]["median"]


def test_collectives_on_a_link(tmp_path: Path) -> None:
    result = answer(
        *("collectives", "--ranks", RANKS, "--link-rates", "0.05", "--messages", "128k"),
        *("--formats", "int8", "--repeats", 3, "--out", tmp_path / "out.json"),
    )
    full, eight = result["rows"]
    assert full["least_seconds"] == pytest.approx(8 * 131_072 / 0.05e9)
    assert eight["least_seconds"] == pytest.approx(full["least_seconds"] * 138 / 128 / 4)
    # The shaper lets no more through than it is told, but for its bucket.
    assert full["seconds"] > 0.7 * full["least_seconds"]
    assert eight["seconds"] > 0.5 * eight["least_seconds"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_stays_after_a_killed_run(tmp_path: Path, number: signal.Signals) -> None:
    folder = make_llama(tmp_path / "m")
    before = interfaces()
    line = [sys.executable, "-m", "megatron_spd.cli", *arguments(folder, tmp_path / "out", "0.01", 10_000)]
    process = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(
            lambda: len(set(outside(tmp_path).values())) == RANKS, 150, "the ranks did not leave the network"
        )
        time.sleep(1)  # into the wiring or the timed runs
        process.send_signal(number)
        process.wait(30)
        # A namespace without a name is gone with its last process, and its interfaces with it.
        wait_until(lambda: not outside(tmp_path), 30, "a rank is left in its network")
    finally:
        process.kill()
        for pid in outside(tmp_path):
            os.kill(pid, signal.SIGKILL)
    assert interfaces() == before


def test_a_link_needs_two_ranks(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "m")
    outcome = command(*arguments(folder, tmp_path / "out", "1"), "--ranks", "1")
    assert outcome.code == 2
    assert "--link-rates needs a link between ranks" in outcome.err
