"""Local ranks through the deepspeed launcher, and a watch over them.

The launcher starts the processes and gives them their environment. What it leaves open is closed here: the ranks'
result and their errors come back to the caller, a rank that dies is named and the others are stopped at once, and
no rank outlives the process that called :func:`launch`.
"""

from __future__ import annotations

import contextlib
import os
import random
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from megatron_spd.errors import RankDied, UserError
from megatron_spd.runtime.rank_status import STATUS_DIR, RankStatus, read_statuses

#: Seconds between two looks at the status files; the end of a process is seen at once.
POLL = 0.1
#: Seconds that finished ranks have to leave by themselves, and killed ones to be gone.
LEAVE = 20.0
_AGAIN = "Run the same command again to go on from the last finished part"


class RankFailed(RankDied):
    """A rank ended by an exception that is a defect of ours; ``trace`` is the rank's traceback."""

    def __init__(self, message: str, trace: str) -> None:
        super().__init__(message)
        self.trace = trace


def launch(argv: Sequence[str], ranks: int, module: str = "megatron_spd.cli") -> dict[str, Any]:
    """Run ``python -m MODULE ARGV`` on ``ranks`` local ranks and return the result of rank 0.

    ``module`` calls :func:`megatron_spd.runtime.rank_status.run_as_rank`. The ranks' standard output goes to
    standard error; progress bars pass through. With fewer CUDA devices than ranks all of them run on the CPU.

    Raises UserError with a rank's own line, :class:`RankFailed` for a rank's other exceptions, RankDied naming the
    rank that was killed or crashed. In each case, and when the caller is interrupted or terminated, no rank is left
    running.
    """
    with tempfile.TemporaryDirectory(prefix="megatron-spd-") as name, _terminated_as_exit():
        folder = Path(name)
        launcher = _start(argv, ranks, module, folder)
        watch = _Watch(launcher, ranks, folder)
        try:
            return watch.result()
        finally:
            watch.stop()


def rank_environment(ranks: int) -> dict[str, str]:
    """The environment for ``ranks`` local ranks: this process's own, an accelerator that has room for them, and the
    cores shared out. What the user has set stays."""
    env = dict(os.environ)
    if "DS_ACCELERATOR" not in env and _cuda_devices() < ranks:
        env["DS_ACCELERATOR"] = "cpu"
    env.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks)))
    return env


def free_port() -> int:
    """A TCP port nobody listens on, outside the range that the kernel gives to outgoing connections."""
    for port in random.SystemRandom().sample(range(20000, 32000), 100):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RuntimeError("none of 100 ports between 20000 and 32000 is free")


def _cuda_devices() -> int:
    import torch

    return torch.cuda.device_count()


def _start(argv: Sequence[str], ranks: int, module: str, folder: Path) -> subprocess.Popen[bytes]:
    env = rank_environment(ranks) | {STATUS_DIR: str(folder)}
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet", "--no_local_rank"]
    # Local ranks only: a cluster's default host file must not be picked up.
    command += ["--hostfile", str(folder / "no-hostfile"), "--num_accelerators", str(ranks)]
    command += ["--master_port", str(free_port()), "--module", module, *argv]
    return subprocess.Popen(
        command,
        env=env,
        stdin=subprocess.PIPE,  # never written: its end of file tells the ranks that this process has ended
        stdout=2,
        start_new_session=True,  # one process group for launcher and ranks, out of reach of the terminal's Ctrl-C
    )


class _Watch:
    """The launcher process and its ranks, from start to end."""

    def __init__(self, launcher: subprocess.Popen[bytes], ranks: int, folder: Path) -> None:
        self.launcher, self.ranks, self.folder = launcher, ranks, folder
        # A pidfd is a process, not a number that may be used again; None: gone before it could be opened.
        self.handles: dict[int, int | None] = {}

    def result(self) -> dict[str, Any]:
        """Wait for the end; the result of rank 0, or the error of the rank that failed first."""
        while True:
            launcher_ended = self.launcher.poll() is not None
            dead, statuses = self._look()
            if len(statuses) == self.ranks and all(s.state == "done" for s in statuses.values()):
                self._let_leave()
                return statuses[0].result or {}
            if launcher_ended or dead or any(s.is_failure for s in statuses.values()):
                # A second look: a death comes before the errors it causes in peers, so it is seen by now.
                raise self._error(*self._look())
            self._wait()

    def stop(self) -> None:
        """Kill what is left of the process group and wait until its ranks are gone."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.launcher.pid, signal.SIGKILL)
        self.launcher.wait()
        deadline = time.monotonic() + LEAVE
        while len(self._ended()) < len(self.handles) and time.monotonic() < deadline:
            time.sleep(0.02)
        for handle in self.handles.values():
            if handle is not None:
                os.close(handle)
        if self.launcher.stdin is not None:
            self.launcher.stdin.close()

    def _look(self) -> tuple[list[int], dict[int, RankStatus]]:
        """Ranks that ended without a result, and every rank's status. The ends are taken first: the status of a
        process that has ended is its last."""
        ended = self._ended()
        statuses = read_statuses(self.folder)
        for rank in statuses.keys() - self.handles.keys():
            try:
                self.handles[rank] = os.pidfd_open(statuses[rank].pid)
            except ProcessLookupError:
                self.handles[rank] = None
        return sorted(r for r in ended if statuses[r].state != "done"), statuses

    def _ended(self) -> set[int]:
        return {rank for rank, h in self.handles.items() if h is None or _readable([h], 0.0)}

    def _wait(self) -> None:
        """Sleep until a running rank ends, but no longer than POLL."""
        ended = self._ended()
        running = [h for rank, h in self.handles.items() if h is not None and rank not in ended]
        _readable(running, POLL)

    def _error(self, dead: list[int], statuses: dict[int, RankStatus]) -> Exception:
        if dead:
            return RankDied(_died(dead))
        failed = [s for s in statuses.values() if s.is_failure]
        if failed:
            first = min(failed, key=lambda s: s.time)
            if first.state == "user_error":
                return UserError(first.message)
            return RankFailed(f"rank {first.rank} failed: {first.message}", first.trace)
        missing = sorted(set(range(self.ranks)) - statuses.keys())
        code = self.launcher.returncode
        if missing:
            return RankDied(
                f"{_names(missing)} ended before the work began (deepspeed launcher exit code {code})"
            )
        return RankDied(f"the deepspeed launcher died (exit code {code}); its ranks were stopped. {_AGAIN}")

    def _let_leave(self) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.launcher.wait(LEAVE)


def _readable(handles: Sequence[int], seconds: float) -> bool:
    """Wait until one of ``handles`` is readable (a pidfd: its process has ended), at most ``seconds``."""
    # Not select(), which takes no file descriptor above 1023.
    poll = select.poll()
    for handle in handles:
        poll.register(handle, select.POLLIN)
    return bool(poll.poll(1000 * seconds))


def _died(ranks: list[int]) -> str:
    return f"{_names(ranks)} died (killed, out of memory, or crashed); the other ranks were stopped. {_AGAIN}"


def _names(ranks: list[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))


@contextlib.contextmanager
def _terminated_as_exit() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP unwind the stack as SIGINT does, so that ``finally`` clauses run."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
