"""The options of every command, as dataclasses; the same names serve as flags and as keys of a ``--config`` file.

Checks that need nothing but the options themselves are made here; ``parsing.py`` fills the options in.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from megatron_spd.errors import UserError

SyncPoints = Literal["attention", "mlp", "any"]
Recovery = Literal["zs", "paper", "grouped", "full"]
#: What calibration may use, by the names of ``--ingredients``.
INGREDIENTS = ("heads", "neurons", "shift", "norm", "refit")
#: What the curve compares, by the names of ``--variants``; the last two are trained.
VARIANTS = ("zero-shot", "shift", "heads", "neurons", "all", "b2b", "finish")
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
    "distill_tokens": (1, None),
    "finish_tokens": (1, None),
    "finish_sequences": (2, None),
    "search_budget": (0, None),
    "calibration_sequences": (2, None),
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

    sync_points: SyncPoints = _option("the sync points that may be dropped (attention: the paper)", "any")
    drop_ratio: float | None = _option("share of the points that may be dropped which is dropped", None)
    drop_count: int | None = _option("number of points to drop", None)
    max_perplexity_increase: float | None = _option(
        "drop as many points as cost at most this percentage, as measured before any training", None
    )
    tau1: float | None = _option(
        "greatest sensitivity of tier ISB (recovered by nothing); default: found", None
    )
    tau2: float | None = _option(
        "greatest sensitivity of tier SB (distilled); above: ESB; default: found", None
    )
    recovery: Recovery = _option(
        "zs: drop only; paper: tiers with distillation and head grouping; grouped: heads and neurons grouped, inputs "
        "compensated, no training; full: grouped, distilled and finished",
        "full",
    )
    search_budget: int | None = _option(
        "sets of points that the search may measure; 0: choose by single points alone; default: 24, or 0 for the "
        "paper's recovery and points",
        None,
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

    @property
    def grouped(self) -> bool:
        """Whether blocks are calibrated (grouped and compensated)."""
        return self.recovery in ("grouped", "full")

    @property
    def sets_to_measure(self) -> int:
        """The search's budget, with its default."""
        if self.search_budget is not None:
            return self.search_budget
        return 0 if self.recovery == "paper" and self.sync_points == "attention" else 24


@dataclass(kw_only=True)
class GroupingOptions(DataOptions):
    """Calibration of the blocks in which something is dropped, in closed form."""

    calibration_sequences: int = _option(
        "pieces of --data to calibrate on, after those that sensitivity is measured on; a quarter of them judges",
        24,
    )
    ingredients: str = _option(
        "what calibration may use, commas between: heads, neurons, shift, norm, refit; a block keeps what helps it",
        "heads,neurons,shift,refit",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.ingredient_names:
            if name not in INGREDIENTS:
                raise UserError(f"--ingredients has {name!r}; known are {', '.join(INGREDIENTS)}")

    @property
    def ingredient_names(self) -> list[str]:
        return _parts(self.ingredients)


@dataclass(kw_only=True)
class TrainingOptions(CommonOptions):
    """Block-to-block distillation. The defaults are what works best on SmolLM2-135M in a few minutes; for large models
    start from the paper's 10 epochs at a learning rate of 5e-5 (LLaMA2) or 1e-6 (OPT)."""

    deepspeed_config: str | None = _option("DeepSpeed JSON file; default: made from the options below", None)
    epochs: int = _option("passes over the calibration pieces for every unit", 4)
    learning_rate: float = _option("greatest learning rate", 3e-4)
    micro_batch_size: int = _option("pieces in one forward pass of a data-parallel replica", 4)
    gradient_accumulation: int = _option("forward passes for one optimizer step", 1)
    loss: Literal["mse", "nmse", "fisher"] = _option(
        "mse of the block output (the paper), normalised by its size, or weighed by what later blocks are sensitive to",
        "mse",
    )
    inputs: Literal["teacher", "student", "mixed"] = _option(
        "hidden states a unit is trained on: the plain model's (the paper), the student's own, or half of each",
        "mixed",
    )
    distill_tokens: int | None = _option(
        "training tokens that each unit sees at most, instead of --epochs", None
    )
    finish: Literal["none", "vectors", "blocks"] | None = _option(
        "last pass, on the plain model's logits: all parameters of blocks with drops, or their norms and shifts; "
        "default: blocks where run recovers fully, else none",
        None,
    )
    finish_tokens: int | None = _option(
        "training tokens of the last pass at most; default: the pieces once", None
    )
    finish_sequences: int | None = _option(
        "pieces of the text for the last pass, from its start; default: those of distillation", None
    )
    finish_learning_rate: float = _option("greatest learning rate of the last pass", 1e-4)
    finish_recompute: bool = _option(
        "in the last pass compute activations twice instead of keeping them", False
    )
    zero_stage: Literal[0, 1, 2] = _option("ZeRO stage", 0)
    dtype: DType = _option("type of weights and activations in training", "fp32")
    tracking: Literal["wandb", "none"] = _option(
        "Weights & Biases (offline unless configured) or none", "wandb"
    )
    max_minutes: float | None = _option(
        "cut training short so that the command takes about this long; with --finish, half of it is for units",
        None,
    )
    seed: int = _option("seed of every random choice", 1234)
    tensor_parallel: int | None = _option(
        "tensor-parallel ranks of one replica (M); the launched ranks' other factor is data parallel; default: all",
        None,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.finish is None:
            self.finish = "blocks" if getattr(self, "recovery", None) == "full" else "none"
        for name in ("learning_rate", "finish_learning_rate"):
            if not getattr(self, name) > 0:
                raise UserError(f"{flag(name)} is {getattr(self, name)}; it must be > 0")
        if self.dtype == "bf16" and self.zero_stage == 0 and self.deepspeed_config is None:
            # DeepSpeed then picks an optimizer whose gradient norm is wrong.
            raise UserError("--dtype bf16 needs --zero-stage 1 or 2")


@dataclass(kw_only=True)
class PrepareOptions(CommonOptions):
    """Turn a model into a clean Hugging Face folder."""

    model: str = _option("smollm2-135m, a GGUF file, or a Hugging Face folder")
    out: str = _option("folder to write")


@dataclass(kw_only=True)
class SensitivityOptions(ModelOptions, RankOptions, GroupingOptions):
    """Measure what dropping each sync point costs."""

    branches: int = _option("branches of the SPD model (G)")
    out: str = _option("JSON file to write; a plot goes beside it")
    method: Literal["algorithm1", "single", "both"] = _option(
        "algorithm1: blocks from the last to the first (the paper); single: each point alone", "both"
    )
    sync_points: SyncPoints = _option("the points measured alone", "any")
    plan: str | None = _option("plan whose head grouping is applied while measuring", None)
    grouped: bool = _option("measure with every dropped point's blocks grouped and compensated", False)
    measure: Literal["perplexity", "kl"] | None = _option(
        "perplexity: the paper's; kl: the perplexity that the divergence from the plain model's predictions stands "
        "for, with far less noise; default: kl with --grouped, else perplexity",
        None,
    )
    dtype: DType = _option("type of weights and activations", "fp32")


@dataclass(kw_only=True)
class PlanOptions(ModelOptions, RankOptions, SelectionOptions, GroupingOptions):
    """Choose the sync points to drop."""

    sensitivity: str = _option("JSON file written by the command sensitivity")
    branches: int = _option("branches of the SPD model (G)")
    out: str = _option("plan to write (JSON)")


@dataclass(kw_only=True)
class GroupOptions(ModelOptions, RankOptions, GroupingOptions):
    """Group heads and neurons and compensate inputs, or only group the heads of the blocks whose tier asks for it."""

    plan: str = _option("plan to start from")
    out: str = _option("plan to write (JSON)")
    calibrated: str | None = _option(
        "folder for the calibrated blocks; default: only the paper's head grouping, which the plan alone describes",
        None,
    )


@dataclass(kw_only=True)
class DistillOptions(ModelOptions, DataOptions, RankOptions, TrainingOptions):
    """Recover the blocks that a plan marks, one unit at a time; a run that was stopped goes on."""

    plan: str = _option("plan to recover")
    calibrated: str | None = _option(
        "folder of the command group that the plan came from, if it calibrated", None
    )
    out: str = _option("run folder")


@dataclass(kw_only=True)
class ExportOptions(ModelOptions):
    """Write the SPD model as a Hugging Face folder."""

    plan: str = _option("plan to export")
    calibrated: str | None = _option(
        "folder of the command group that the plan came from, if it calibrated", None
    )
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
    """Write the report of a run folder, or a curve, again."""

    run: str = _option("folder of the command run, or of curve")


@dataclass(kw_only=True)
class RunOptions(ModelOptions, RankOptions, SelectionOptions, GroupingOptions, TrainingOptions):
    """The whole chain into one run folder; a run that was stopped goes on."""

    branches: int = _option("branches of the SPD model (G)")
    out: str = _option("run folder; the model goes to its export, the report to its report folder")
    eval_data: str | None = _option(
        "text to score on; default: pieces of --data that are not used otherwise", None
    )
    eval_sequences: int = _option("number of pieces to score on", 8)
    distill_sequences: int = _option("number of pieces of --data to distil on", 64)


@dataclass(kw_only=True)
class CurveOptions(ModelOptions, RankOptions, GroupingOptions, TrainingOptions):
    """Perplexity and accuracy against the share of dropped sync points; a curve that was stopped goes on."""

    branches: int = _option("branches of the SPD model (G)")
    out: str = _option(
        "folder for the curve: curve.json, curve.png, a table, and the weights that were trained"
    )
    sync_points: SyncPoints = _option("the sync points that may be dropped (attention: the paper)", "any")
    ratios: str = _option(
        "shares of the points that may be dropped which are dropped, with commas between",
        "0.25,0.5,0.7,0.8,0.9,1.0",
    )
    variants: str = _option(
        "lines of the curve, with commas between: zero-shot, shift, heads (as published), neurons, all (of "
        "--ingredients), b2b (all, then distilled), finish (b2b, then the last pass)",
        ",".join(VARIANTS),
    )
    search_budget: int | None = _option(
        "sets of points that the search may measure at each ratio; 0: choose by single points alone; default: 24",
        None,
    )
    eval_data: str | None = _option(
        "text to score on; default: pieces of --data that are not used otherwise", None
    )
    eval_sequences: int = _option("number of pieces to score on", 8)
    distill_sequences: int = _option("number of pieces of --data to distil on", 64)
    tasks: str | None = _option("lm-eval tasks whose accuracy is drawn, as in the command evaluate", None)
    limit: int | None = _option("documents of each task, the first so many; default: all", None)
    task_variants: str = _option("variants whose accuracy is measured", "zero-shot,all,finish")
    orders: bool = _option("also compare the points' order of sensitivity before and after grouping", False)
    finish: Literal["none", "vectors", "blocks"] = _option(
        "what the variant finish trains on the plain model's logits: all parameters of blocks with drops, or their "
        "norms and shifts",
        "blocks",
    )
    tracking: Literal["wandb", "none"] = _option(
        "Weights & Biases (offline unless configured) or none", "none"
    )
    max_minutes: float | None = _option(
        "cut training short so that it takes about this long at each ratio; half of it is for the variant finish",
        None,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("variants", "task_variants"):
            for variant in _parts(getattr(self, name)):
                if variant not in VARIANTS:
                    raise UserError(f"{flag(name)} has {variant!r}; known are {', '.join(VARIANTS)}")
        if not self.ratio_values or not self.variant_names:
            raise UserError("--ratios and --variants need at least one value each")
        if self.finish == "none" and "finish" in self.variant_names:
            raise UserError(
                "--finish none makes no last pass; leave finish out of --variants, or give what it trains"
            )
        if self.limit is not None and self.tasks is None:
            raise UserError("--limit is for tasks; give some with --tasks, or leave it out")

    @property
    def ratio_values(self) -> list[float]:
        """The ratios, ascending, each once. Raises UserError for what is not a share."""
        try:
            values = {float(part) for part in _parts(self.ratios)}
        except ValueError:
            raise UserError(f"--ratios is {self.ratios!r}; expected numbers with commas between") from None
        for value in values:
            if not 0 < value <= 1:
                raise UserError(f"--ratios has {value:g}; each must be above 0 and at most 1")
        return sorted(values)

    @property
    def variant_names(self) -> list[str]:
        """The variants in the order of :data:`VARIANTS`."""
        return [name for name in VARIANTS if name in _parts(self.variants)]

    @property
    def task_variant_names(self) -> list[str]:
        """The variants whose accuracy is measured; none without ``--tasks``."""
        return (
            [] if self.tasks is None else [n for n in self.variant_names if n in _parts(self.task_variants)]
        )


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
    "curve": CurveOptions,
}


def _parts(text: str) -> list[str]:
    """What stands between commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def flag(name: str) -> str:
    """The flag of the field ``name``."""
    return "--" + name.replace("_", "-")
