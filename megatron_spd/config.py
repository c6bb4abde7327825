"""The options of every command, as dataclasses; the same names serve as flags and as keys of a ``--config`` file.

Put together from the groups in ``options.py``; ``parsing.py`` fills them in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_spd.collective import CollectiveFormat
from megatron_spd.errors import UserError
from megatron_spd.options import (
    VARIANTS,
    CollectiveOptions,
    CommonOptions,
    DataOptions,
    DType,
    Format,
    GroupingOptions,
    LinkOptions,
    ModelOptions,
    OptimizeOptions,
    RankOptions,
    SyncPoints,
    TrainingOptions,
    flag,
    low_bit_formats,
    message_sizes,
    numbers,
    option,
    parts,
)


@dataclass(kw_only=True)
class PrepareOptions(CommonOptions):
    """Turn a model into a clean Hugging Face folder."""

    model: str = option("smollm2-135m, a GGUF file, or a Hugging Face folder")
    out: str = option("folder to write")


@dataclass(kw_only=True)
class SensitivityOptions(ModelOptions, RankOptions, GroupingOptions):
    """Measure what dropping each sync point costs."""

    branches: int = option("branches of the SPD model (G)")
    out: str = option("JSON file to write; a plot goes beside it")
    method: Literal["algorithm1", "single", "both"] = option(
        "algorithm1: blocks from the last to the first (the paper); single: each point alone", "both"
    )
    sync_points: SyncPoints = option("the points measured alone", "any")
    plan: str | None = option("plan whose head grouping is applied while measuring", None)
    grouped: bool = option("measure with every dropped point's blocks grouped and compensated", False)
    measure: Literal["perplexity", "kl"] | None = option(
        "perplexity: the paper's; kl: the perplexity that the divergence from the plain model's predictions stands "
        "for, with far less noise; default: kl with --grouped or --collectives, else perplexity",
        None,
    )
    collectives: str | None = option(
        "low-bit formats with commas between, as int8,int4: also measure each of them at every point, nothing dropped",
        None,
    )
    dtype: DType = option("type of weights and activations", "fp32")

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.formats  # wrong ones are refused before anything starts

    @property
    def formats(self) -> list[str]:
        """The low-bit formats to measure, in their canonical spelling."""
        return low_bit_formats("collectives", self.collectives)


@dataclass(kw_only=True)
class PlanOptions(ModelOptions, RankOptions, OptimizeOptions, GroupingOptions):
    """Choose the sync points to drop, and the collectives of the others (--dry-run: only say what `run` would take)."""

    sensitivity: str = option("JSON file written by the command sensitivity")
    branches: int = option("branches of the SPD model (G)")
    out: str = option("plan to write (JSON)")


@dataclass(kw_only=True)
class GroupOptions(ModelOptions, RankOptions, GroupingOptions):
    """Group heads and neurons and compensate inputs, or only group the heads of the blocks whose tier asks for it."""

    plan: str = option("plan to start from")
    out: str = option("plan to write (JSON)")
    calibrated: str | None = option(
        "folder for the calibrated blocks; default: only the paper's head grouping, which the plan alone describes",
        None,
    )


@dataclass(kw_only=True)
class DistillOptions(ModelOptions, DataOptions, RankOptions, TrainingOptions):
    """Recover the blocks that a plan marks, one unit at a time; a run that was stopped goes on."""

    plan: str = option("plan to recover")
    calibrated: str | None = option(
        "folder of the command group that the plan came from, if it calibrated", None
    )
    out: str = option("run folder")


@dataclass(kw_only=True)
class ExportOptions(ModelOptions, CollectiveOptions):
    """Write the SPD model as a Hugging Face folder."""

    plan: str = option("plan to export")
    calibrated: str | None = option(
        "folder of the command group that the plan came from, if it calibrated", None
    )
    distilled: str | None = option(
        "run folder of the command distill; default: the model's own weights", None
    )
    out: str = option("folder to write")


@dataclass(kw_only=True)
class EvaluateOptions(ModelOptions, DataOptions, RankOptions):
    """Measure a plain or an exported SPD folder: perplexity always, tasks and generation where asked for."""

    against: str | None = option(
        "folder to compare with: the plain model, or any of the same vocabulary", None
    )
    tasks: str | None = option(
        "lm-eval tasks with commas between; paper: the paper's seven; offline: spd_next_word, spd_continuation",
        None,
    )
    limit: int | None = option("documents of each task, the first so many; default: all", None)
    generation: bool = option("compare greedy continuations with those of --against", False)
    max_new_tokens: int = option("tokens of a continuation for --generation", 128)
    dtype: DType = option("type of weights and activations", "fp32")
    batch_size: int = option("pieces, or a task's requests, in one forward pass", 8)

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

    prompt: str = option("text to continue")
    max_new_tokens: int = option("tokens to add at most", 20)


@dataclass(kw_only=True)
class ReportOptions(CommonOptions):
    """Write the report of a run folder, or a curve, again."""

    run: str = option("folder of the command run, or of curve")


@dataclass(kw_only=True)
class RunOptions(ModelOptions, RankOptions, OptimizeOptions, GroupingOptions, TrainingOptions):
    """The whole chain into one run folder; a run that was stopped goes on."""

    branches: int = option("branches of the SPD model (G)")
    out: str = option("run folder; the model goes to its export, the report to its report folder")
    eval_data: str | None = option(
        "text to score on; default: pieces of --data that are not used otherwise", None
    )
    eval_sequences: int = option("number of pieces to score on", 8)
    distill_sequences: int = option("number of pieces of --data to distil on", 64)


@dataclass(kw_only=True)
class DryRunOptions(RunOptions):
    """What `run` with these options takes of memory, disk and time, from the model's config alone (no weights)."""

    file_flag = "--recipe"
    starts_ranks = False

    dry_run: bool = option("print estimates instead of making a plan", False)
    config: str = option("name of a known model (llama2-70b, ...), or the path of its config.json")
    recipe: str | None = option("YAML or JSON file with options of the command run", None)
    model: str = option("not used", "")
    out: str = option("not used", "")
    ranks: int = option("ranks of all nodes together", 1)
    nodes: int = option("machines that the ranks are spread over", 1)
    hardware: Literal["a100-80gb", "h100-80gb", "h200-141gb", "l40-48gb", "cpu"] = option(
        "device of a rank: its memory, and for times its data sheet", "a100-80gb"
    )
    efficiency: float = option("share of the data sheet's operations per second that is reached", 0.4)
    disk_rate: float = option("GB/s that a node reads from disk", 2.0)
    node_rate: float = option("GB/s that a rank sends to other nodes", 12.5)
    peak_tflops: float | None = option(
        "10^12 operations per second of a device in --dtype, instead of the data sheet's", None
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("efficiency", "disk_rate", "node_rate", "peak_tflops"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise UserError(f"{flag(name)} is {value}; it must be above 0")


@dataclass(kw_only=True)
class CurveOptions(ModelOptions, RankOptions, GroupingOptions, TrainingOptions):
    """Perplexity and accuracy against the share of dropped sync points; a curve that was stopped goes on."""

    branches: int = option("branches of the SPD model (G)")
    out: str = option(
        "folder for the curve: curve.json, curve.png, a table, and the weights that were trained"
    )
    sync_points: SyncPoints = option("the sync points that may be dropped (attention: the paper)", "any")
    ratios: str = option(
        "shares of the points that may be dropped which are dropped, with commas between",
        "0.25,0.5,0.7,0.8,0.9,1.0",
    )
    variants: str = option(
        "lines of the curve, with commas between: zero-shot, shift, heads (as published), neurons, all (of "
        "--ingredients), b2b (all, then distilled), finish (b2b, then the last pass)",
        ",".join(VARIANTS),
    )
    search_budget: int | None = option(
        "sets of points that the search may measure at each ratio; 0: choose by single points alone; default: 24",
        None,
    )
    eval_data: str | None = option(
        "text to score on; default: pieces of --data that are not used otherwise", None
    )
    eval_sequences: int = option("number of pieces to score on", 8)
    distill_sequences: int = option("number of pieces of --data to distil on", 64)
    tasks: str | None = option("lm-eval tasks whose accuracy is drawn, as in the command evaluate", None)
    limit: int | None = option("documents of each task, the first so many; default: all", None)
    task_variants: str = option("variants whose accuracy is measured", "zero-shot,all,finish")
    orders: bool = option("also compare the points' order of sensitivity before and after grouping", False)
    finish: Literal["none", "vectors", "blocks"] = option(
        "what the variant finish trains on the plain model's logits: all parameters of blocks with drops, or their "
        "norms and shifts",
        "blocks",
    )
    tracking: Literal["wandb", "none"] = option(
        "Weights & Biases (offline unless configured) or none", "none"
    )
    max_minutes: float | None = option(
        "cut training short so that it takes about this long at each ratio; half of it is for the variant finish",
        None,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("variants", "task_variants"):
            for variant in parts(getattr(self, name)):
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
            values = {float(part) for part in parts(self.ratios)}
        except ValueError:
            raise UserError(f"--ratios is {self.ratios!r}; expected numbers with commas between") from None
        for value in values:
            if not 0 < value <= 1:
                raise UserError(f"--ratios has {value:g}; each must be above 0 and at most 1")
        return sorted(values)

    @property
    def variant_names(self) -> list[str]:
        """The variants in the order of :data:`VARIANTS`."""
        return [name for name in VARIANTS if name in parts(self.variants)]

    @property
    def task_variant_names(self) -> list[str]:
        """The variants whose accuracy is measured; none without ``--tasks``."""
        return [] if self.tasks is None else [n for n in self.variant_names if n in parts(self.task_variants)]


@dataclass(kw_only=True)
class BenchOptions(ModelOptions, LinkOptions):
    """Time to first token and between tokens: plain tensor parallelism, SPD, low-bit, and no communication at all."""

    out: str = option("folder for bench.json, bench.md, bench.png and breakdown.png")
    branches: int | None = option("branches (G) of the compared plans; default: as many as ranks", None)
    drops: str = option(
        "what is dropped, with commas between: none, attention (all attention points), a number of points, or a share "
        "of all like 50%%",
        "none,attention",
    )
    collectives: str = option(
        "collectives of the kept points, with commas between, as in a plan: full, int8, int4:g32", "full"
    )
    plans: str | None = option("plans or SPD exports to compare as well, with commas between", None)
    batch_sizes: str = option("prompts at a time, with commas between", "1")
    prompt_lengths: str = option("tokens of a prompt, with commas between", "128")
    new_tokens: int = option("tokens to generate after each prompt", 16)
    rounds: int = option("times that everything is timed", 10)
    ranks_per_node: int = option(
        "with --link-rates: ranks in a row that stand for a node; they share one link, and no link is between them",
        1,
    )
    dtype: DType = option("type of weights and activations", "fp32")
    seed: int = option("seed of the prompts", 1234)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_nodes()
        if not parts(self.drops) or not parts(self.collectives):
            raise UserError("--drops and --collectives need at least one value each")
        # Wrong numbers are refused before any rank starts.
        _ = self.batch_values, self.prompt_values, self.rate_values

    def _check_nodes(self) -> None:
        """Raise UserError for nodes that cannot be made of the ranks."""
        size = self.ranks_per_node
        if size == 1:
            return
        if not self.rate_values:
            raise UserError(
                "--ranks-per-node says which ranks are behind one link: give --link-rates as well"
            )
        if size < 1 or self.ranks % size or self.ranks == size:
            raise UserError(
                f"--ranks-per-node {size} makes no two or more equal nodes of --ranks {self.ranks}; give a smaller "
                "divisor of it"
            )

    @property
    def batch_values(self) -> list[int]:
        return numbers("batch_sizes", self.batch_sizes, int)

    @property
    def prompt_values(self) -> list[int]:
        return numbers("prompt_lengths", self.prompt_lengths, int)


@dataclass(kw_only=True)
class CollectivesOptions(LinkOptions):
    """All-reduces between ranks: in full against low-bit formats, for several sizes of a message."""

    formats: str = option("low-bit formats, with commas between", "int8,int4,int4:g64,int4/int8")
    messages: str = option(
        "bytes of a message, with commas between; k and M: times 1024", "16k,64k,256k,1M,4M"
    )
    repeats: int = option("times that everything is timed", 15)
    dtype: DType = option("type of the values", "fp32")
    out: str | None = option("JSON file to write", None)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.repeats < 1:
            raise UserError(f"--repeats is {self.repeats}; expected a number above 0")
        # Wrong values are refused before any rank starts.
        _ = self.format_names, self.message_sizes, self.rate_values

    @property
    def format_names(self) -> list[str]:
        return [str(CollectiveFormat.parse(name)) for name in parts(self.formats)]

    @property
    def message_sizes(self) -> list[int]:
        """In bytes."""
        return message_sizes("messages", self.messages)


@dataclass(kw_only=True)
class ConvertOptions(CommonOptions):
    """Turn a Hugging Face folder, a Megatron checkpoint or an SPD export into another of them, bytes unchanged."""

    from_format: Format = option(
        "what --input is: hf, megatron (torch_dist or mp_rank_XX) or spd", alias="--from"
    )
    to_format: Format = option("what to write: hf, megatron (torch_dist) or spd", alias="--to")
    input: str = option("folder to read")
    output: str = option("folder to write; it must not exist")
    plan: str | None = option(
        "plan that makes an SPD model of a plain one; one that only drops points and moves heads and neurons",
        None,
    )
    hf_config: str | None = option(
        "Hugging Face folder with the config.json and the tokenizer of a Megatron checkpoint that has none",
        None,
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
    "bench": BenchOptions,
    "collectives": CollectivesOptions,
    "convert": ConvertOptions,
}
