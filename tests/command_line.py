"""The command line inside the test's own process: the same code as `megatron-spd`, without a start of seconds
each time."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_spd import cli
from megatron_spd.runtime.distributed import shutdown

#: What starts a line for the user.
ERROR = "megatron-spd: error: "


@dataclass(frozen=True)
class Outcome:
    """Exit code and what was printed."""

    code: int
    out: str
    err: str


def command(*argv: object) -> Outcome:
    """Run `megatron-spd ARGV`."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main([str(a) for a in argv])
    # A process of its own would have ended; here the groups that a failed command has joined must not pile up.
    shutdown()
    return Outcome(code, out.getvalue(), err.getvalue())


def answer(*argv: object) -> dict[str, Any]:
    """Run `megatron-spd ARGV --json`, which must succeed: the object on the last line of its standard output."""
    outcome = command(*argv, "--json")
    assert outcome.code == 0, outcome.err
    return json.loads(outcome.out.splitlines()[-1])


def files(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder`` with its bytes; empty folders too."""
    found = {p: p.read_bytes() if p.is_file() else b"" for p in sorted(folder.rglob("*"))}
    return {str(p.relative_to(folder)): content for p, content in found.items()}
