"""The command line: ``megatron-spd COMMAND [options]``.

The commands themselves are functions in :mod:`megatron_spd.commands`; here are what they share: options, starting the
ranks, printing the result, and errors.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import megatron_spd
from megatron_spd.config import COMMANDS, DryRunOptions, PlanOptions
from megatron_spd.errors import RankDied, UserError
from megatron_spd.options import CommonOptions
from megatron_spd.parsing import parse_options
from megatron_spd.runtime.failures import as_user_error, one_line
from megatron_spd.runtime.rank_status import hide_cuda_from_cpu_ranks, is_launched, run_as_rank

PROG = "megatron-spd"
#: Seconds that other ranks leave to rank 0 to speak first where a foreign launcher started them.
_AFTER_MAIN = 5.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for what the user can mend (one line on standard error), 1 for a
    defect of ours, 128 + n after signal n."""
    argv = list(sys.argv[1:] if argv is None else argv)
    hide_cuda_from_cpu_ranks()
    if is_launched():
        return run_as_rank(lambda: execute(argv)[1])
    try:
        options, result = execute(argv)
    except KeyboardInterrupt:
        print(f"{PROG}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        return _report(error, debug="--debug" in argv)
    if _rank() == 0:
        _print_result(result, as_json=options is not None and options.json)
    return 0


def execute(argv: Sequence[str]) -> tuple[CommonOptions | None, dict[str, Any]]:
    """Run one command, on several ranks where it asks for them: its options and its result as plain JSON data.

    Raises UserError for a wrong command line, and whatever the command raises.
    """
    if not argv or argv[0] in ("-h", "--help"):
        return None, {"text": _usage()}
    if argv[0] == "--version":
        return None, {"text": f"{PROG} {megatron_spd.__version__}"}
    name = argv[0]
    if name not in COMMANDS:
        raise UserError(f"unknown command {name!r}; the commands are {', '.join(COMMANDS)}")
    kind = COMMANDS[name]
    if kind is PlanOptions and "--dry-run" in argv:
        name, kind = "dry_run", DryRunOptions
    options = parse_options(kind, argv[1:], f"{PROG} {argv[0]}")
    ranks = getattr(options, "ranks", 1)
    if kind.starts_ranks and "RANK" in os.environ:
        _adopt_world(options)
    elif kind.starts_ranks and ranks > 1:
        from megatron_spd.runtime.launch import launch

        return options, launch(argv, ranks)
    # Megatron-core says at every start which of its optional packages are missing.
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    from megatron_spd import commands

    return options, plain(getattr(commands, name)(options))


def plain(value: Any) -> Any:
    """``value`` as strict JSON data: paths as strings, tuples as lists, NaN and infinities as null."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _adopt_world(options: CommonOptions) -> None:
    """A launcher has started the ranks already: theirs is the number that counts."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    ranks = getattr(options, "ranks", world)
    if ranks not in (1, world):
        raise UserError(
            f"--ranks is {ranks}, but the launcher started {world}; leave --ranks out or make them equal"
        )
    if hasattr(options, "ranks"):
        options.ranks = world


def _print_result(result: Mapping[str, Any], as_json: bool) -> None:
    """For people the result's "text"; with ``--json`` everything else on one line."""
    if as_json:
        print(json.dumps({k: v for k, v in result.items() if k != "text"}, allow_nan=False), flush=True)
    elif "text" in result:
        print(result["text"], flush=True)
    else:
        print(json.dumps(result, indent=1, allow_nan=False), flush=True)


def _report(error: Exception, debug: bool) -> int:
    """Say what went wrong, once however many ranks there are; returns the exit code."""
    if _rank() > 0:
        # Ranks mostly fail together. The launcher stops this one while it waits if rank 0 failed too.
        time.sleep(_AFTER_MAIN)
    user_error = as_user_error(error)
    trace = getattr(error, "trace", "")  # of a rank that failed: its own says more than ours
    if debug or trace or not (user_error or isinstance(error, RankDied)):
        print(trace or "".join(traceback.format_exception(error)), end="", file=sys.stderr)
    print(f"{PROG}: error: {one_line(user_error or error)}", file=sys.stderr, flush=True)
    return 2 if not trace and (user_error or isinstance(error, RankDied)) else 1


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {(kind.__doc__ or '').splitlines()[0]}" for name, kind in COMMANDS.items()]
    return "\n".join(
        [
            f"usage: {PROG} COMMAND [options]",
            "",
            "Sync-Point Drop: a tensor-parallel language model with fewer all-reduces.",
            "",
            *lines,
            "",
            f"`{PROG} COMMAND --help` shows a command's options.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
