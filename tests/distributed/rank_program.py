"""What the ranks of test_launch.py run: ``python -m tests.distributed.rank_program CASE FOLDER``."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from megatron_spd.errors import UserError
from megatron_spd.runtime.rank_status import run_as_rank


def work(case: str, folder: Path) -> dict[str, Any]:
    """Leaves a file with the rank's process id in ``folder``, then does what ``case`` says."""
    rank = int(os.environ["RANK"])
    if case == "collective":
        sum_of_ranks()  # the pid file says that the rank is in the midst of collectives
    (folder / f"{rank}.tmp").write_text(str(os.getpid()))
    os.replace(folder / f"{rank}.tmp", folder / f"{rank}.pid")
    if case == "sum":
        return sum_of_ranks()
    if case == "user error" and rank == 1:
        raise UserError("G = 4 branches\ndo not divide 3 groups")
    if case == "defect" and rank == 1:
        raise KeyError("lost")
    if case == "full disk" and rank == 1:
        with open("/dev/full", "w") as file:
            file.write("x" * 100_000)
    if case == "collective":
        while True:
            sum_of_ranks()
    time.sleep(300)
    return {}


def sum_of_ranks() -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo")
    total = torch.tensor([dist.get_rank() + 1.0])
    dist.all_reduce(total)
    print("this goes to standard error")
    return {"sum": total.item(), "world": dist.get_world_size()}


if __name__ == "__main__":
    sys.exit(run_as_rank(lambda: work(sys.argv[1], Path(sys.argv[2]))))
