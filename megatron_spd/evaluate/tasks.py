"""lm-eval tasks on a plain or an exported SPD model, through lm-eval's own class for Hugging Face models.

lm-eval is imported in functions: it is optional (the extra ``eval``) and takes seconds.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from megatron_spd.errors import UserError
from megatron_spd.evaluate.local_tasks import LOCAL_TASKS
from megatron_spd.runtime.failures import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: The zero-shot tasks of the SPD paper by lm-eval's names, and the one name that stands for all of them.
PAPER_TASKS = ("arc_easy", "arc_challenge", "hellaswag", "lambada_openai", "piqa", "sciq", "winogrande")
PAPER = "paper"

#: Resamples for standard errors that have no formula (that of LAMBADA's perplexity); accuracies have one.
_RESAMPLES = 1000
_SEED = 1234


def task_names(text: str) -> list[str]:
    """The tasks in the comma-separated ``text``, each once, with ``paper`` spelled out. Raises UserError for none."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise UserError(
            f"--tasks is {text!r}; give task names separated by commas, for example spd_next_word"
        )
    return list(dict.fromkeys(n for name in names for n in (PAPER_TASKS if name == PAPER else (name,))))


def load_tasks(names: Sequence[str]) -> Mapping[str, Any]:
    """The tasks ``names`` with their data, as lm-eval holds them, for :func:`run_tasks`.

    Local tasks (:mod:`megatron_spd.evaluate.local_tasks`) need nothing; the others are lm-eval's and load their data
    from the Hugging Face hub or its cache. Raises UserError if lm-eval is missing, a name is unknown, or a task's data
    cannot be had.
    """
    try:
        from lm_eval.models.huggingface import HFLM  # noqa: F401  what run_tasks will need
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(
            f'--tasks needs lm-eval ({one_line(error)}); install it with pip install "megatron_spd[eval]"'
        ) from None
    with _quiet():
        # lm-eval's own tasks are 14 thousand small files to read.
        manager = TaskManager(include_defaults=any(name not in LOCAL_TASKS for name in names))
        known = {*manager.all_tasks, *LOCAL_TASKS}
        for name in names:
            if name not in known:
                raise UserError(f"unknown task {name!r}; {_near(name, known)}")
        loaded = [_load_task(manager, name) for name in names]
        try:
            return manager.load([item for items in loaded for item in items])
        except ValueError as error:
            raise UserError(f"--tasks: {one_line(error)}; name it once") from None


def _near(name: str, known: set[str]) -> str:
    near = difflib.get_close_matches(name, sorted(known), 3)
    local = f"tasks that need no network are {', '.join(LOCAL_TASKS)}"
    return f"did you mean {' or '.join(near)}?" if near else f"`lm-eval ls tasks` lists lm-eval's; {local}"


def _load_task(manager: Any, name: str) -> list[Any]:
    """lm-eval's object for one name: a group, or its tasks."""
    if name in LOCAL_TASKS:
        return list(manager.load([LOCAL_TASKS[name]])["tasks"].values())
    try:
        found = manager.load([name])
    except (ConnectionError, FileNotFoundError) as error:
        raise UserError(
            f"the data of task {name!r} cannot be reached ({one_line(error)}); go online once to fill the cache of "
            f"Hugging Face datasets, or use the local tasks {', '.join(LOCAL_TASKS)}"
        ) from error
    except (ImportError, RuntimeError, ValueError) as error:
        raise UserError(f"task {name!r} cannot be loaded: {one_line(error)}; leave it out") from error
    group = found["groups"].get(name)
    return list(found["tasks"].values()) if group is None else [group]


def run_tasks(
    tasks: Mapping[str, Any],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int = 8,
    limit: int | None = None,
) -> dict[str, dict[str, Any]]:
    """lm-eval's metrics of ``model``, zero-shot unless a task says otherwise, by task (and group, where one was named).

    ``tasks``: from :func:`load_tasks`; the model is used where it is, on one process. ``limit``: only the first
    so many documents of each task. A task's result holds ``documents``, their number, and for each metric (``acc``,
    or ``exact_match,FILTER`` where a task filters answers) its ``value`` and ``stderr`` (None where lm-eval has none).
    """
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    with _quiet():
        # Tasks are handed to several models; lm-eval leaves a model's answers in them and replaces them here.
        for task in tasks["tasks"].values():
            task.set_fewshot_seed(_SEED)
        lm = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
        found = evaluate(lm, tasks, limit=limit, bootstrap_iters=_RESAMPLES, log_samples=False)
    return {
        name: {"documents": _documents(found, name), **_metrics(values)}
        for name, values in found["results"].items()
    }


def _documents(found: Mapping[str, Any], name: str) -> int | None:
    counts = found["n-samples"].get(name)
    return None if counts is None else int(counts["effective"])


def _metrics(values: Mapping[str, Any]) -> dict[str, Any]:
    """lm-eval's flat ``metric,filter`` and ``metric_stderr,filter`` -> metric -> value and stderr."""
    metrics: dict[str, Any] = {}
    for key, value in values.items():
        metric, comma, rule = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        stderr = values.get(f"{metric}_stderr,{rule}")
        name = metric if rule == "none" else key
        metrics[name] = {
            "value": float(value),
            "stderr": float(stderr) if isinstance(stderr, int | float) else None,
        }
    return metrics


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval as a library: its words on standard error, its warnings and those of the hub's retries nowhere, and no
    processes forked from this one for a bootstrap."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    single = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if single is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = single
