"""Groups of options that commands share, and the checks that need nothing but the options themselves.

``config.py`` puts them together for every command; ``parsing.py`` fills them in.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from megatron_spd.collective import FULL, CollectiveFormat
from megatron_spd.errors import UserError
from megatron_spd.plan import Routing

SyncPoints = Literal["attention", "mlp", "any"]
Recovery = Literal["zs", "paper", "grouped", "full"]
#: What a plan with several collectives is to save.
Objective = Literal["bytes", "latency"]
#: What calibration may use, by the names of ``--ingredients``.
INGREDIENTS = ("heads", "neurons", "shift", "norm", "refit")
#: What the curve compares, by the names of ``--variants``; the last two are trained.
VARIANTS = ("zero-shot", "shift", "heads", "neurons", "all", "b2b", "finish")
DType = Literal["fp32", "bf16"]
#: What a model can be converted from and to.
Format = Literal["hf", "megatron", "spd"]

#: Sets that a search measures where nothing else is said.
SEARCH_BUDGET = 24

#: Least and greatest value of a number, by field name; None: no bound.
LIMITS: dict[str, tuple[float, float | None]] = {
    "branches": (1, None),
    "ranks": (1, None),
    "nodes": (1, None),
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
    "new_tokens": (2, None),
    "rounds": (1, None),
    "call_latency": (0, 60_000),
    "prompt_tokens": (1, None),
    "ranks_served": (2, None),
    "save_every": (1, None),
}


def option(help: str, default: Any = dataclasses.MISSING, alias: str | None = None) -> Any:
    """A dataclass field with the text that ``--help`` shows; required without a default. ``alias``: another flag for
    it, where the flag that users know is no name that a field can have."""
    metadata: dict[str, Any] = {"help": help}
    return dataclasses.field(default=default, metadata=metadata | ({"aliases": [alias]} if alias else {}))


@dataclass(kw_only=True)
class CommonOptions:
    """What every command takes."""

    #: The flag that names a file with options, and whether ``ranks`` are started for the command.
    file_flag: ClassVar[str] = "--config"
    starts_ranks: ClassVar[bool] = True

    config: str | None = option("YAML or JSON file with defaults for the options", None)
    json: bool = option("print one JSON object as the last line of standard output", False)
    debug: bool = option("show the traceback of an error", False)
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
    model: str = option("Hugging Face folder of the model")


@dataclass(kw_only=True)
class DataOptions(CommonOptions):
    data: str | None = option("UTF-8 text file; default: English text embedded in Python's library", None)
    sequences: int = option("number of text pieces, taken one after the other from the start", 8)
    seq_length: int = option("tokens in a piece", 256)


@dataclass(kw_only=True)
class RankOptions(CommonOptions):
    ranks: int = option("tensor-parallel ranks to start on this machine through the deepspeed launcher", 1)


@dataclass(kw_only=True)
class LinkOptions(RankOptions):
    """Ranks behind links of a set speed (see ``latency/link.py``)."""

    link_rates: str | None = option(
        "Gbit/s with commas between: put each rank behind a link of that speed, in a network namespace of its own "
        "(root only)",
        None,
    )

    @property
    def rate_values(self) -> list[float]:
        """In Gbit/s; none where the links are left as they are."""
        return [] if self.link_rates is None else numbers("link_rates", self.link_rates, float)


@dataclass(kw_only=True)
class CollectiveOptions(CommonOptions):
    """What runs at the sync points that are kept: "full" or a low-bit format (see ``collective.py``)."""

    collective: str | None = option(
        "all-reduce at kept points: full, or low-bit int<bits>[/int<gather bits>][:g<group>] such as int8, int4:g64, "
        "int4/int8",
        None,
    )
    attention_collective: str | None = option("the same for points after an attention alone", None)
    mlp_collective: str | None = option("the same for points after an MLP alone", None)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("collective", "attention_collective", "mlp_collective"):
            given = getattr(self, name)
            if given not in (None, FULL):
                _format(name, given)

    @property
    def kept_collectives(self) -> tuple[str, str] | None:
        """Those after attentions and after MLPs; None where no option was given."""
        if self.collective is self.attention_collective is self.mlp_collective is None:
            return None
        every = self.collective or FULL
        return self.attention_collective or every, self.mlp_collective or every


@dataclass(kw_only=True)
class SelectionOptions(CollectiveOptions):
    """Which sync points are dropped; at most one of ratio, count and perplexity increase."""

    sync_points: SyncPoints = option("the sync points that may be dropped (attention: the paper)", "any")
    drop_ratio: float | None = option("share of the points that may be dropped which is dropped", None)
    drop_count: int | None = option("number of points to drop", None)
    max_perplexity_increase: float | None = option(
        "drop as many points as cost at most this percentage, as measured before any training", None
    )
    tau1: float | None = option(
        "greatest sensitivity of tier ISB (recovered by nothing); default: found", None
    )
    tau2: float | None = option(
        "greatest sensitivity of tier SB (distilled); above: ESB; default: found", None
    )
    recovery: Recovery = option(
        "zs: drop only; paper: tiers with distillation and head grouping; grouped: heads and neurons grouped, inputs "
        "compensated, no training; full: grouped, distilled and finished",
        "full",
    )
    routing: Routing = option(
        "of a model with experts. branch: every branch chooses a token's experts by its own view of the hidden state; "
        "first: the first branch chooses for all, which sends a little behind a dropped attention point",
        "branch",
    )
    search_budget: int | None = option(
        "sets of points that the search may measure; 0: choose by single points alone; default: 24, or 0 for the "
        "paper's recovery and points (without --collectives)",
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
        return 0 if self.recovery == "paper" and self.sync_points == "attention" else SEARCH_BUDGET


@dataclass(kw_only=True)
class OptimizeOptions(SelectionOptions):
    """Several collectives among which a plan chooses, point by point, beside dropping it."""

    collectives: str | None = option(
        "choose at every point among drop, full and these low-bit formats, with commas between, such as int8,int4: the "
        "cheapest plan that keeps --max-perplexity-increase",
        None,
    )
    optimize: Objective | None = option(
        "what is cheap, with --collectives. bytes: fewest bytes for each token; latency: least predicted time of the "
        "collectives of a prompt; default: bytes",
        None,
    )
    link_rate: float | None = option("for latency: Gbit/s that a rank sends", None)
    call_latency: float | None = option(
        "for latency: milliseconds of a collective call beside its bytes; default: 0", None
    )
    prompt_tokens: int | None = option("for latency: tokens of the prompt; default: 128", None)
    ranks_served: int | None = option(
        "for latency: tensor-parallel ranks that will serve the model; default: as many as --branches", None
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        latency = ("link_rate", "call_latency", "prompt_tokens", "ranks_served")
        given = [flag(name) for name in ("optimize", *latency) if getattr(self, name) is not None]
        if self.collectives is None:
            if given:
                raise UserError(
                    f"{given[0]} is for plans with several collectives; name the low-bit ones with --collectives"
                )
            return
        if not self.formats:
            raise UserError(f"--collectives is {self.collectives!r}; expected at least one low-bit format")
        if self.kept_collectives is not None:
            raise UserError("--collective and --collectives exclude each other; give one of them")
        if self.max_perplexity_increase is None:
            raise UserError("--collectives needs the accuracy to keep: give --max-perplexity-increase")
        if self.optimize == "latency":
            if self.link_rate is None or not 0 < self.link_rate < float("inf"):
                raise UserError(
                    f"--optimize latency needs --link-rate above 0 (Gbit/s), got {self.link_rate}"
                )
        elif given := [flag(name) for name in latency if getattr(self, name) is not None]:
            raise UserError(f"{given[0]} is for --optimize latency")

    @property
    def formats(self) -> list[str]:
        """The low-bit formats to choose among, in their canonical spelling; none without ``--collectives``."""
        return low_bit_formats("collectives", self.collectives)

    @property
    def sets_to_measure(self) -> int:
        """The search's budget: with several collectives the paper's points are measured too."""
        if self.search_budget is None and self.collectives is not None:
            return SEARCH_BUDGET
        return super().sets_to_measure


@dataclass(kw_only=True)
class GroupingOptions(DataOptions):
    """Calibration of the blocks in which something is dropped, in closed form."""

    calibration_sequences: int = option(
        "pieces of --data to calibrate on, after those that sensitivity is measured on; a quarter of them judges",
        24,
    )
    ingredients: str = option(
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
        return parts(self.ingredients)


@dataclass(kw_only=True)
class TrainingOptions(CommonOptions):
    """Block-to-block distillation. The defaults are what works best on SmolLM2-135M in a few minutes; for large models
    start from the paper's 10 epochs at a learning rate of 5e-5 (LLaMA2) or 1e-6 (OPT)."""

    deepspeed_config: str | None = option("DeepSpeed JSON file; default: made from the options below", None)
    epochs: int = option("passes over the calibration pieces for every unit", 4)
    learning_rate: float = option("greatest learning rate", 3e-4)
    micro_batch_size: int = option("pieces in one forward pass of a data-parallel replica", 4)
    gradient_accumulation: int = option("forward passes for one optimizer step", 1)
    loss: Literal["mse", "nmse", "fisher"] = option(
        "mse of the block output (the paper), normalised by its size, or weighed by what later blocks are sensitive to",
        "mse",
    )
    inputs: Literal["teacher", "student", "mixed"] = option(
        "hidden states a unit is trained on: the plain model's (the paper), the student's own, or half of each",
        "mixed",
    )
    distill_tokens: int | None = option(
        "training tokens that each unit sees at most, instead of --epochs", None
    )
    finish: Literal["none", "vectors", "blocks"] | None = option(
        "last pass, on the plain model's logits: all parameters of blocks with drops, or their norms and shifts; "
        "default: blocks where run recovers fully, else none",
        None,
    )
    finish_tokens: int | None = option(
        "training tokens of the last pass at most; default: the pieces once", None
    )
    finish_sequences: int | None = option(
        "pieces of the text for the last pass, from its start; default: those of distillation", None
    )
    finish_learning_rate: float = option("greatest learning rate of the last pass", 1e-4)
    finish_recompute: bool = option(
        "in the last pass compute activations twice instead of keeping them", False
    )
    zero_stage: Literal[0, 1, 2, 3] = option("ZeRO stage", 0)
    dtype: DType = option("type of weights and activations in training", "fp32")
    tracking: Literal["wandb", "none"] = option(
        "Weights & Biases (offline unless configured) or none", "wandb"
    )
    max_minutes: float | None = option(
        "cut training short so that the command takes about this long; with --finish, half of it is for units",
        None,
    )
    seed: int = option("seed of every random choice", 1234)
    tensor_parallel: int | None = option(
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
            raise UserError("--dtype bf16 needs --zero-stage 1, 2 or 3")


def flag(name: str) -> str:
    """The flag of the field ``name``."""
    return "--" + name.replace("_", "-")


def parts(text: str) -> list[str]:
    """What stands between commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def low_bit_formats(name: str, text: str | None) -> list[str]:
    """The low-bit formats between commas in the field ``name``, canonical, each once; "full" may be among them. Raises
    UserError for anything else."""
    found = []
    for part in parts(text or ""):
        if part != FULL:
            found.append(_format(name, part))
    return list(dict.fromkeys(found))


def _format(name: str, text: str) -> str:
    try:
        return str(CollectiveFormat.parse(text))
    except UserError as error:
        raise UserError(f"{flag(name)}: {error}, or {FULL}") from None


def numbers(name: str, text: str, kind: type[int] | type[float]) -> list[Any]:
    """The numbers above 0 between commas in the field ``name``, each once, as given. Raises UserError for anything else
    and for none."""
    try:
        values = [kind(part) for part in parts(text)]
    except ValueError:
        values = []
    if not values or not all(0 < value < float("inf") for value in values):
        what = "whole numbers" if kind is int else "numbers"
        raise UserError(f"{flag(name)} is {text!r}; expected {what} above 0 with commas between")
    return list(dict.fromkeys(values))


def message_sizes(name: str, text: str) -> list[int]:
    """The bytes between commas in the field ``name``, each once; k and M stand for 1024 and its square.

    Raises UserError for anything else.
    """
    found = []
    for part in parts(text):
        digits, unit = (part[:-1], part[-1]) if part[-1] in "kM" else (part, "")
        if not digits.isdecimal() or int(digits) == 0:
            raise UserError(
                f"{flag(name)} is {text!r}; expected bytes like 500, 16k or 4M with commas between"
            )
        found.append(int(digits) * {"": 1, "k": 1024, "M": 1024**2}[unit])
    if not found:
        raise UserError(f"{flag(name)} is empty; expected bytes like 500, 16k or 4M with commas between")
    return list(dict.fromkeys(found))
