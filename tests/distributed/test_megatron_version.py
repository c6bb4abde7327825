"""The tests run with the Megatron-core that they are meant to run with, in ranks and started programs too."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.ranks import run_ranks

#: Set by launch/test_megatron_versions.sh; otherwise the pinned one.
WANTED = (
    os.environ.get("MEGATRON_CORE_VERSION")
    or re.search(r"^megatron-core==(.+)$", (Path(__file__).parents[2] / "constraints.txt").read_text(), re.M)[
        1
    ]
)


def _release(version: str) -> str:
    """Without the commit that 0.19 adds to its version where it lies in a git repository."""
    return version.split("+")[0]


def version() -> str:
    import megatron.core

    return _release(megatron.core.__version__)


def test_here_and_on_a_rank() -> None:
    assert version() == WANTED
    assert run_ranks(1, version) == [WANTED]


def test_in_a_started_program() -> None:
    program = "from megatron.core.package_info import __version__ as v; print(v)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert _release(done.stdout.split()[-1]) == WANTED
