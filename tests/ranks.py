"""Run a function on several real gloo ranks, with a time-out.

Ranks are kept alive between tests (importing torch and Megatron-core takes longer than most tests); a
time-out or an error in a collective ends the whole pool, and the next call starts a fresh one.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import multiprocessing as mp
import multiprocessing.forkserver
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

import psutil

_PRELOAD = ["torch", "megatron.core.models.gpt", "transformers", "tests.ranks"]
_pools: dict[int, RankPool] = {}


#: ``prctl``'s option (linux/prctl.h): the signal that a process gets when the one that started it ends.
_PR_SET_PDEATHSIG = 1


class RankError(AssertionError):
    """A rank raised, died or did not answer in time."""


def _serve(rank: int, world: int, store_file: str, pipe: Any) -> None:
    import torch
    import torch.distributed as dist

    # Ranks are the fork server's children, and it ends when nobody holds its pipe: the tests, also killed ones, and, if
    # they did not close it, the ranks, which would stay for ever, stopped.
    os.close(mp.forkserver._forkserver._forkserver_alive_fd)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    # Shorter than any test's own limit: a hung collective reports itself.
    os.environ["MEGATRON_SPD_TIMEOUT"] = "40"
    from datetime import timedelta

    dist.init_process_group(
        "gloo", init_method=f"file://{store_file}", rank=rank, world_size=world, timeout=timedelta(seconds=40)
    )
    while True:
        message = pipe.recv()
        if message is None:
            break
        function, args, kwargs = message
        try:
            pipe.send((True, function(*args, **kwargs)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
    os._exit(0)


class RankPool:
    """``world`` processes joined by gloo.

    They are stopped between functions: each of a rank's seventy gloo threads wakes up a hundred times a second, and a
    dozen idle ranks would take a core from the tests.
    """

    def __init__(self, world: int) -> None:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(_PRELOAD)
        handle, self._store = tempfile.mkstemp(prefix="spd-ranks-")
        os.close(handle)
        os.unlink(self._store)
        self._ranks = []
        for rank in range(world):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world, self._store, theirs), daemon=True)
            process.start()
            self._ranks.append((process, mine))

    def run(self, function: Callable[..., Any], args: tuple, kwargs: dict, timeout: float) -> list[Any]:
        self._signal(signal.SIGCONT)
        for _, pipe in self._ranks:
            pipe.send((function, args, kwargs))
        deadline = time.monotonic() + timeout
        answers: dict[int, Any] = {}
        while len(answers) < len(self._ranks):
            for rank, (process, pipe) in enumerate(self._ranks):
                if rank in answers or not pipe.poll(0.002):
                    if rank not in answers and not process.is_alive():
                        self.stop()
                        raise RankError(f"rank {rank} died with exit code {process.exitcode}")
                    continue
                ok, value = pipe.recv()
                if not ok:
                    self.stop()
                    raise RankError(f"rank {rank} raised:\n{value}")
                answers[rank] = value
            if time.monotonic() > deadline:
                self.stop()
                silent = sorted(set(range(len(self._ranks))) - set(answers))
                raise RankError(f"ranks {silent} did not answer within {timeout} s")
        self._signal(signal.SIGSTOP)
        return [answers[rank] for rank in range(len(self._ranks))]

    def _signal(self, number: signal.Signals) -> None:
        for process, _ in self._ranks:
            if process.is_alive():
                os.kill(process.pid, number)

    def stop(self) -> None:
        """End the ranks, and what they have started (Megatron-core's checkpoints leave a queue's process behind)."""
        started = []
        for process, _ in self._ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                started += psutil.Process(process.pid).children(recursive=True)
            process.kill()
        for child in started:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        for process, _ in self._ranks:
            process.join(5)
        _pools.pop(len(self._ranks), None)


def run_ranks(
    world: int, function: Callable[..., Any], *args: Any, timeout: float = 60.0, **kwargs: Any
) -> list[Any]:
    """``function(*args, **kwargs)`` on every rank of a world; the answers in rank order. ``function`` must be
    importable.

    Raises RankError with the rank's traceback, or if a rank dies or is silent for ``timeout`` seconds.
    """
    pool = _pools.get(world)
    if pool is None:
        pool = _pools[world] = RankPool(world)
    return pool.run(function, args, kwargs, timeout)


@atexit.register
def stop_pools() -> None:
    """End all ranks that wait for another function, and give their memory back."""
    for pool in list(_pools.values()):
        pool.stop()
