"""What a distillation run tells Weights & Biases.

Offline unless the environment variable WANDB_MODE says otherwise: nothing leaves the machine that nobody asked to send.
``wandb sync RUN/wandb/offline-run-*`` uploads an offline run later. wandb is imported only where a tracker needs it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, cast, get_args

from megatron_spd.errors import UserError

TRACKERS = ("wandb", "none")
#: Values of WANDB_MODE.
Mode = Literal["online", "offline", "disabled", "shared"]
MODES = get_args(Mode)
PROJECT = "megatron-spd"


class Tracker:
    """Records one run; a tracker of kind ``none``, or of any rank but the main one, accepts all calls and does nothing.

    A resumed command starts a new W&B run; the runs of one folder share a W&B group.

    Args:
        kind: "wandb" or "none".
        run_dir: the run directory; W&B's files go to ``run_dir/wandb``, its name is the group.
        is_main: whether this is the rank that records.
        name: W&B's name of the run; None: the name of ``run_dir``.

    Raises:
        UserError: an unknown kind, a WANDB_MODE that W&B does not know, wandb not installed, or a run that W&B cannot
            start (online without a login, for example).
    """

    def __init__(self, kind: str, run_dir: Path, is_main: bool = True, name: str | None = None) -> None:
        if kind not in TRACKERS:
            raise UserError(f"tracking {kind!r}; expected one of {list(TRACKERS)}")
        self._run: Any = None
        self._metrics: set[str] = set()
        if kind == "wandb" and is_main:
            self._run = _start(run_dir, name or run_dir.resolve().name)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finish(failed=error is not None)

    def config(self, values: Mapping[str, Any]) -> None:
        """Options and facts of the run."""
        if self._run is not None:
            self._run.config.update(dict(values), allow_val_change=True)

    def curve(self, name: str, step: int, **values: float) -> None:
        """``values`` after optimizer step ``step`` of the training ``name`` ("unit 7", "finish"): curves over its own
        steps."""
        if self._run is None:
            return
        axis = f"{name}/step"
        for metric in (f"{name}/{value}" for value in values):
            if metric not in self._metrics:
                self._metrics.add(metric)
                self._run.define_metric(axis, hidden=True)
                self._run.define_metric(metric, step_metric=axis)
        self._run.log({axis: step, **{f"{name}/{value}": number for value, number in values.items()}})

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table, such as the sensitivity of every sync point."""
        if self._run is not None:
            import wandb

            self._run.log({name: wandb.Table(columns=list(columns), data=[list(row) for row in rows])})

    def summary(self, values: Mapping[str, Any]) -> None:
        """Final figures of the run, such as perplexity before and after."""
        if self._run is not None:
            self._run.summary.update(dict(values))

    def plan_artifact(self, path: str | Path) -> None:
        """The plan file as an artifact of type ``plan``. Raises UserError if there is no such file."""
        if self._run is None:
            return
        import wandb

        if not Path(path).is_file():
            raise UserError(f"no plan at {path} to record; make one with `megatron-spd plan`")
        artifact = wandb.Artifact(f"plan-{self._run.id}", type="plan")
        artifact.add_file(str(path), name="plan.json")
        self._run.log_artifact(artifact)

    def finish(self, failed: bool = False) -> None:
        """Write everything out and end the run; calling it again does nothing."""
        run, self._run = self._run, None
        if run is not None:
            run.finish(exit_code=int(failed))


def _start(run_dir: Path, name: str) -> Any:
    """A running W&B run that writes below ``run_dir/wandb``."""
    mode = os.environ.get("WANDB_MODE", "offline")
    if mode not in MODES:
        raise UserError(f"WANDB_MODE is {mode!r}; expected one of {list(MODES)}")
    try:
        import wandb
    except ImportError:
        raise UserError("wandb is not installed; install it or run with --tracking none") from None

    run_dir.mkdir(parents=True, exist_ok=True)
    # Only what is logged here is recorded: no console output, machine statistics, git state or source code.
    settings = wandb.Settings(
        silent=True,
        console="off",
        disable_git=True,
        x_disable_stats=True,
        x_disable_meta=True,
        x_save_requirements=False,
    )
    try:
        return wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            dir=str(run_dir),
            name=name,
            group=run_dir.resolve().name,
            mode=cast(Mode, mode),
            settings=settings,
        )
    except wandb.Error as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"W&B could not start: {reason}; log in, set WANDB_MODE=offline, or run with --tracking none"
        ) from error
