"""The options of every command, as dataclasses; the same names serve as flags and as keys of a ``--config`` file.

``--drop-ratio``, ``--drop_ratio`` and the YAML or JSON key ``drop_ratio`` (or ``drop-ratio``) are one option. A flag
overrides the file. Checks that need nothing but the options themselves are made here.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, cast

import yaml

from megatron_spd.errors import UserError

SyncPoints = Literal["attention", "mlp", "any"]
DType = Literal["fp32", "bf16"]

#: Least and greatest value of a number, by field name; None: no bound.
LIMITS: dict[str, tuple[float, float | None]] = {
    "branches": (1, None),
    "ranks": (1, None),
    "sequences": (1, None),
    "eval_sequences": (1, None),
    "distill_sequences": (2, None),
    "tensor_parallel": (1, None),
    "seq_length": (2, None),
    "batch_size": (1, None),
    "max_new_tokens": (1, None),
    "limit": (1, None),
    "drop_ratio": (0, 1),
    "drop_count": (0, None),
    "max_perplexity_increase": (0, None),
    "epochs": (1, None),
    "micro_batch_size": (1, None),
    "gradient_accumulation": (1, None),
    "max_minutes": (0, None),
}


def _option(help: str, default: Any = dataclasses.MISSING) -> Any:
    """A dataclass field with the text that ``--help`` shows; required without a default."""
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass(kw_only=True)
class CommonOptions:
    """What every command takes."""

    config: str | None = _option("YAML or JSON file with defaults for the options", None)
    json: bool = _option("print one JSON object as the last line of standard output", False)
    debug: bool = _option("show the traceback of an error", False)
    local_rank: int | None = dataclasses.field(
        default=None, metadata={"help": "given by launchers; not used"}
    )

    def __post_init__(self) -> None:
        """Raise UserError for a number out of its bounds or for options that exclude each other."""
        for name, (least, greatest) in LIMITS.items():
            value = getattr(self, name, None)
            # Written so that NaN is refused too.
            if value is not None and not (value >= least and (greatest is None or value <= greatest)):
                expected = f">= {least}" if greatest is None else f"between {least} and {greatest}"
                raise UserError(f"{flag(name)} is {value}; it must be {expected}")


@dataclass(kw_only=True)
class ModelOptions(CommonOptions):
    model: str = _option("Hugging Face folder of the model")


@dataclass(kw_only=True)
class DataOptions(CommonOptions):
    data: str | None = _option("UTF-8 text file; default: English text embedded in Python's library", None)
    sequences: int = _option("number of text pieces, taken one after the other from the start", 8)
    seq_length: int = _option("tokens in a piece", 256)


@dataclass(kw_only=True)
class RankOptions(CommonOptions):
    ranks: int = _option("tensor-parallel ranks to start on this machine through the deepspeed launcher", 1)


@dataclass(kw_only=True)
class SelectionOptions(CommonOptions):
    """Which sync points are dropped; at most one of ratio, count and perplexity increase."""

    sync_points: SyncPoints = _option(
        "the sync points that may be dropped (attention: the paper)", "attention"
    )
    drop_ratio: float | None = _option("share of the points that may be dropped which is dropped", None)
    drop_count: int | None = _option("number of points to drop", None)
    max_perplexity_increase: float | None = _option(
        "drop as many points as cost at most this percentage", None
    )
    tau1: float | None = _option(
        "greatest sensitivity of tier ISB (recovered by nothing); default: found", None
    )
    tau2: float | None = _option(
        "greatest sensitivity of tier SB (distilled); above: ESB; default: found", None
    )
    recovery: Literal["zs", "paper"] = _option(
        "zs: drop only; paper: tiers with distillation and head grouping", "paper"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        rules = ("drop_ratio", "drop_count", "max_perplexity_increase")
        given = [flag(name) for name in rules if getattr(self, name) is not None]
        if len(given) > 1:
            raise UserError(f"{' and '.join(given)} exclude each other; give one of them")
        if (self.tau1 is None) != (self.tau2 is None):
            raise UserError("--tau1 and --tau2 belong together; give both or none")
        if self.tau1 is not None and self.tau2 is not None and not self.tau1 <= self.tau2:
            raise UserError(f"--tau1 {self.tau1} is above --tau2 {self.tau2}; it must be at most that")


@dataclass(kw_only=True)
class TrainingOptions(CommonOptions):
    """Block-to-block distillation. The defaults are what works best on SmolLM2-135M in a few minutes; for large models
    start from the paper's 10 epochs at a learning rate of 5e-5 (LLaMA2) or 1e-6 (OPT)."""

    deepspeed_config: str | None = _option("DeepSpeed JSON file; default: made from the options below", None)
    epochs: int = _option("passes over the calibration pieces for every unit", 4)
    learning_rate: float = _option("greatest learning rate", 3e-4)
    micro_batch_size: int = _option("pieces in one forward pass of a data-parallel replica", 4)
    gradient_accumulation: int = _option("forward passes for one optimizer step", 1)
    loss: Literal["mse", "nmse"] = _option(
        "mse of the block output (the paper), or normalised by its size", "mse"
    )
    zero_stage: Literal[0, 1, 2] = _option("ZeRO stage", 0)
    dtype: DType = _option("type of weights and activations in training", "fp32")
    tracking: Literal["wandb", "none"] = _option(
        "Weights & Biases (offline unless configured) or none", "wandb"
    )
    max_minutes: float | None = _option("cut training short so that the command takes about this long", None)
    seed: int = _option("seed of every random choice", 1234)
    tensor_parallel: int | None = _option(
        "tensor-parallel ranks of one replica (M); the launched ranks' other factor is data parallel; default: all",
        None,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.learning_rate > 0:
            raise UserError(f"--learning-rate is {self.learning_rate}; it must be > 0")
        if self.dtype == "bf16" and self.zero_stage == 0 and self.deepspeed_config is None:
            # DeepSpeed then picks an optimizer whose gradient norm is wrong.
            raise UserError("--dtype bf16 needs --zero-stage 1 or 2")


@dataclass(kw_only=True)
class PrepareOptions(CommonOptions):
    """Turn a model into a clean Hugging Face folder."""

    model: str = _option("smollm2-135m, a GGUF file, or a Hugging Face folder")
    out: str = _option("folder to write")


@dataclass(kw_only=True)
class SensitivityOptions(ModelOptions, DataOptions, RankOptions):
    """Measure what dropping each sync point costs."""

    branches: int = _option("branches of the SPD model (G)")
    out: str = _option("JSON file to write; a plot goes beside it")
    method: Literal["algorithm1", "single", "both"] = _option(
        "algorithm1: blocks from the last to the first (the paper); single: each point alone", "both"
    )
    sync_points: SyncPoints = _option("the points measured alone", "any")
    plan: str | None = _option("plan whose head grouping is applied while measuring", None)
    dtype: DType = _option("type of weights and activations", "fp32")


@dataclass(kw_only=True)
class PlanOptions(ModelOptions, SelectionOptions):
    """Choose the sync points to drop."""

    sensitivity: str = _option("JSON file written by the command sensitivity")
    branches: int = _option("branches of the SPD model (G)")
    out: str = _option("plan to write (JSON)")


@dataclass(kw_only=True)
class GroupOptions(ModelOptions, DataOptions):
    """Choose the head grouping of the blocks whose tier asks for it."""

    plan: str = _option("plan to start from")
    out: str = _option("plan to write (JSON)")


@dataclass(kw_only=True)
class DistillOptions(ModelOptions, DataOptions, RankOptions, TrainingOptions):
    """Recover the blocks that a plan marks, one unit at a time; a run that was stopped goes on."""

    plan: str = _option("plan to recover")
    out: str = _option("run folder")


@dataclass(kw_only=True)
class ExportOptions(ModelOptions):
    """Write the SPD model as a Hugging Face folder."""

    plan: str = _option("plan to export")
    distilled: str | None = _option(
        "run folder of the command distill; default: the model's own weights", None
    )
    out: str = _option("folder to write")


@dataclass(kw_only=True)
class EvaluateOptions(ModelOptions, DataOptions, RankOptions):
    """Measure a plain or an exported SPD folder: perplexity always, tasks and generation where asked for."""

    against: str | None = _option(
        "folder to compare with: the plain model, or any of the same vocabulary", None
    )
    tasks: str | None = _option(
        "lm-eval tasks with commas between; paper: the paper's seven; offline: spd_next_word, spd_continuation",
        None,
    )
    limit: int | None = _option("documents of each task, the first so many; default: all", None)
    generation: bool = _option("compare greedy continuations with those of --against", False)
    max_new_tokens: int = _option("tokens of a continuation for --generation", 128)
    dtype: DType = _option("type of weights and activations", "fp32")
    batch_size: int = _option("pieces, or a task's requests, in one forward pass", 8)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.generation and self.against is None:
            raise UserError(
                "--generation compares with another model; give the plain model with --against DIR"
            )
        if self.limit is not None and self.tasks is None:
            raise UserError("--limit is for tasks; give some with --tasks, or leave it out")
        self.check_processes()

    def check_processes(self) -> None:
        """Raise UserError where more than one rank would run what runs on one process."""
        single = [name for name in ("tasks", "generation") if getattr(self, name)]
        if single and self.ranks > 1:
            raise UserError(
                f"{flag(single[0])} runs on one process, not on {self.ranks} ranks; leave --ranks out"
            )


@dataclass(kw_only=True)
class GenerateOptions(ModelOptions):
    """Continue a text, greedily, with a plain or an exported SPD folder."""

    prompt: str = _option("text to continue")
    max_new_tokens: int = _option("tokens to add at most", 20)


@dataclass(kw_only=True)
class ReportOptions(CommonOptions):
    """Write the report of a run folder again."""

    run: str = _option("run folder")


@dataclass(kw_only=True)
class RunOptions(ModelOptions, DataOptions, RankOptions, SelectionOptions, TrainingOptions):
    """The whole chain into one run folder; a run that was stopped goes on."""

    branches: int = _option("branches of the SPD model (G)")
    out: str = _option("run folder; the model goes to its export, the report to its report folder")
    eval_data: str | None = _option(
        "text to score on; default: pieces of --data that are not used otherwise", None
    )
    eval_sequences: int = _option("number of pieces to score on", 8)
    distill_sequences: int = _option("number of pieces of --data to distil on", 64)


COMMANDS: dict[str, type[CommonOptions]] = {
    "prepare": PrepareOptions,
    "sensitivity": SensitivityOptions,
    "plan": PlanOptions,
    "group": GroupOptions,
    "distill": DistillOptions,
    "export": ExportOptions,
    "evaluate": EvaluateOptions,
    "generate": GenerateOptions,
    "report": ReportOptions,
    "run": RunOptions,
}


def flag(name: str) -> str:
    """The flag of the field ``name``."""
    return "--" + name.replace("_", "-")


_Options = TypeVar("_Options", bound=CommonOptions)


def parse_options(kind: type[_Options], argv: Sequence[str], prog: str) -> _Options:
    """The options of class ``kind`` from flags and, below them, from the file named by ``--config``.

    Raises UserError naming the flag or key that is unknown, missing, of a wrong kind or out of bounds.
    """
    # Here, not above: half a second that `--version` and a wrong command name need not wait for.
    from transformers import HfArgumentParser

    class Parser(HfArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise UserError(f"{message}; see `{prog} --help`")

    parser = Parser(
        cast(Any, kind),
        prog=prog,
        description=(kind.__doc__ or "").splitlines()[0],
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    file = _config_file(argv)
    defaults = [] if file is None else _file_flags(kind, file)
    options, unknown = parser.parse_args_into_dataclasses(
        [*defaults, *argv], return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        name = unknown[0].split("=")[0].removeprefix("--").replace("-", "_")
        raise UserError(f"unknown option {unknown[0]!r}; {_did_you_mean(name, _names(kind), flag)}")
    return cast(_Options, options)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default where there is one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def _names(kind: type[CommonOptions]) -> list[str]:
    return sorted({f.name for f in dataclasses.fields(kind)} - {"local_rank"})


def _did_you_mean(name: str, known: Sequence[str], spelling: Callable[[str], str]) -> str:
    near = difflib.get_close_matches(name, known, 1)
    return f"did you mean {spelling(near[0])}?" if near else f"known are {', '.join(map(spelling, known))}"


def _config_file(argv: Sequence[str]) -> Path | None:
    """The last ``--config`` in ``argv``; the parser itself complains about one without a value."""
    file = None
    for here, following in zip(argv, [*argv[1:], None], strict=True):
        if here == "--config" and following is not None:
            file = Path(following)
        elif here.startswith("--config="):
            file = Path(here.removeprefix("--config="))
    return file


def _file_flags(kind: type[CommonOptions], path: Path) -> list[str]:
    """The content of a config file as flags, so that one parser checks both."""
    names = [name for name in _names(kind) if name != "config"]
    flags = []
    for key, value in _read_config(path).items():
        name = str(key).replace("-", "_")
        if name not in names:
            raise UserError(f"{path}: unknown key {key!r}; {_did_you_mean(name, names, str)}")
        if isinstance(value, (list, dict)):
            raise UserError(f"{path}: key {key!r} is {type(value).__name__}, expected a single value")
        if value is not None:
            flags.append(f"{flag(name)}={value}")
    return flags


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"no config file at {path}; give a YAML or JSON file")
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (UnicodeDecodeError, json.JSONDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} is neither YAML nor JSON: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {type(content).__name__}, expected option names with values")
    return content
