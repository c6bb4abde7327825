"""What a launched rank tells the process that launched it: one small JSON file for each rank, replaced atomically.

The launching side is :mod:`megatron_spd.runtime.launch`. Both sides agree on three things:

- A rank that fails writes so and then waits to be stopped. A rank process that has ended without a "done" was
  therefore killed or crashed, and is the culprit, whatever errors its peers got from their broken connections.
- The launching process holds the write end of every rank's standard input. Its end, even by SIGKILL, is an end of
  file there, and the rank ends too.
- The result of rank 0 is the result of the run.
"""

from __future__ import annotations

import json
import os
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_spd.runtime.failures import as_user_error, one_line

#: Set in the ranks' environment to the folder of status files.
STATUS_DIR = "MEGATRON_SPD_STATUS_DIR"
#: Seconds that a failed rank waits to be stopped before it ends by itself.
FAILED_WAIT = 30.0

State = Literal["started", "done", "user_error", "error"]


@dataclass(frozen=True)
class RankStatus:
    """One status file. ``message`` is one line; ``trace`` the traceback of an ``error``; ``result`` that of rank 0."""

    rank: int
    pid: int
    state: State
    time: float = field(default_factory=time.time)
    message: str = ""
    trace: str = ""
    result: dict[str, Any] | None = None

    @property
    def is_failure(self) -> bool:
        return self.state in ("user_error", "error")

    def write(self, folder: Path) -> None:
        """Put the status in place of the rank's earlier one."""
        path = folder / f"rank-{self.rank}.json"
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(asdict(self)), encoding="utf-8")
        os.replace(temporary, path)


def read_statuses(folder: Path) -> dict[int, RankStatus]:
    """The latest status of every rank that has written one."""
    found = (RankStatus(**json.loads(p.read_text(encoding="utf-8"))) for p in folder.glob("rank-*.json"))
    return {status.rank: status for status in found}


def is_launched() -> bool:
    """True in a rank that :func:`megatron_spd.runtime.launch.launch` started."""
    return STATUS_DIR in os.environ


def hide_cuda_from_cpu_ranks() -> None:
    """Make torch agree with DeepSpeed that a rank with ``DS_ACCELERATOR=cpu`` has no CUDA device.

    The deepspeed launcher numbers CUDA devices for it all the same. Call it before anything asks torch for devices.
    """
    if "RANK" in os.environ and os.environ.get("DS_ACCELERATOR") == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def run_as_rank(work: Callable[[], dict[str, Any]]) -> int:
    """Do ``work`` in a launched rank and report how it went; returns the exit code (0, 1, or 2 for a UserError).

    Call it before anything slow is imported, so that the launching process knows the rank early.
    """
    folder, rank = Path(os.environ[STATUS_DIR]), int(os.environ["RANK"])
    threading.Thread(target=_end_with_launcher, daemon=True).start()
    RankStatus(rank, os.getpid(), "started").write(folder)
    try:
        result = work()
        RankStatus(rank, os.getpid(), "done", result=result if rank == 0 else None).write(folder)
        return 0
    except Exception as error:
        user_error = as_user_error(error)
        if user_error is not None:
            status = RankStatus(rank, os.getpid(), "user_error", message=one_line(user_error))
        else:
            message = f"{type(error).__name__}: {one_line(error)}"
            status = RankStatus(rank, os.getpid(), "error", message=message, trace=traceback.format_exc())
        status.write(folder)
        time.sleep(FAILED_WAIT)
        return 1 if user_error is None else 2


def _end_with_launcher() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)
