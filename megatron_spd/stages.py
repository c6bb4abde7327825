"""The stages of making an SPD model, as the commands and ``run`` call them. Every function is called on all ranks."""

from __future__ import annotations

import dataclasses
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_spd import __version__
from megatron_spd.calibration.stream import BlockStreamer, BlockWeights
from megatron_spd.calibration.text import read_text, token_batches
from megatron_spd.checkpoint.export import export
from megatron_spd.checkpoint.hf import CheckpointReader
from megatron_spd.collective import CollectiveFormat
from megatron_spd.config import CurveOptions, RunOptions
from megatron_spd.distill.engine import EngineSettings
from megatron_spd.distill.finish import finish
from megatron_spd.distill.recipe import distill
from megatron_spd.distill.settings import DistillSettings, FinishSettings
from megatron_spd.distill.tracking import Tracker
from megatron_spd.distill.units import FinishStore, UnitStore, trained_block
from megatron_spd.errors import UserError
from megatron_spd.grouping.formulas import AttentionSettings
from megatron_spd.grouping.heads import group_heads
from megatron_spd.grouping.permute import planned_weights
from megatron_spd.models.build import DTYPES
from megatron_spd.options import DataOptions, TrainingOptions
from megatron_spd.plan import BaseModel, SPDPlan
from megatron_spd.progress import progress_bar
from megatron_spd.runtime.distributed import Runtime

_PACKAGES = ("torch", "megatron-core", "deepspeed", "transformers")


def calibration_tokens(
    reader: CheckpointReader, options: DataOptions, sequences: int | None = None, skip: int = 0
) -> Tensor:
    """Token pieces [sequences, seq_length] of ``--data``; ``skip`` pieces are passed over first."""
    text = read_text(options.data)
    return token_batches(reader.tokenizer(), text, sequences or options.sequences, options.seq_length, skip)


def scoring_tokens(reader: CheckpointReader, options: RunOptions | CurveOptions, used: int) -> Tensor:
    """Pieces [eval_sequences, seq_length] of ``--eval-data``, or of ``--data`` behind the ``used`` first ones."""
    scored = dataclasses.replace(options, data=options.eval_data or options.data)
    return calibration_tokens(reader, scored, options.eval_sequences, 0 if options.eval_data else used)


def check_ranks(base: BaseModel, ranks: int, branches: int | None = None) -> None:
    """Raise UserError unless M = ``ranks`` can run the model: M divides G where there are branches, else the heads."""
    if branches is not None:
        SPDPlan.dense(base, branches).check_ranks(ranks)
        return
    parts = (base.num_attention_heads, base.num_key_value_heads, base.intermediate_size)
    if any(n % ranks for n in parts):
        fits = [m for m in range(1, base.num_key_value_heads + 1) if not any(n % m for n in parts)]
        raise UserError(
            f"M = {ranks} ranks do not divide the model's {base.num_attention_heads} heads, "
            f"{base.num_key_value_heads} key/value groups and {base.intermediate_size} neurons; M may be one of {fits}"
        )


def load_plan(path: str, reader: CheckpointReader) -> SPDPlan:
    """The plan at ``path``, checked against the model. Raises PlanError."""
    plan = SPDPlan.load(path)
    plan.check_model(reader.fingerprint(), str(reader.folder))
    return plan


def make_streamer(
    reader: CheckpointReader,
    runtime: Runtime,
    plan: SPDPlan | None = None,
    distilled: Path | None = None,
    dtype: str = "fp32",
    micro_batch: int = 8,
) -> BlockStreamer:
    """A streamer over the model's final weights: an export's own, or the base model's in the plan's order,
    with distilled blocks in their place."""
    return BlockStreamer(reader, runtime, DTYPES[dtype], final_weights(reader, plan, distilled), micro_batch)


def final_weights(
    reader: CheckpointReader,
    plan: SPDPlan | None,
    distilled: Path | None = None,
    calibrated: Path | None = None,
) -> BlockWeights:
    """Block weights as they are run and exported (see :func:`make_streamer`): finished over distilled over
    calibrated ones, over the base model's in the plan's order."""
    if reader.plan is not None or plan is None:
        return reader.block
    folders = [] if distilled is None else [finish_folder(distilled), distilled]
    folders += [] if calibrated is None else [calibrated]
    return trained_weights(folders, planned_weights(reader, plan))


def trained_weights(folders: Sequence[Path], initial: BlockWeights) -> BlockWeights:
    """Blocks from the first of ``folders`` that trained them (see ``units.trained_block``), the others
    ``initial``."""

    def weights(block: int) -> Mapping[str, Tensor]:
        trained = trained_block(folders, block)
        return initial(block) if trained is None else trained

    return weights


def group_plan(streamer: BlockStreamer, plan: SPDPlan, tokens: Tensor) -> SPDPlan:
    """The plan with heads regrouped in every block whose recovery asks for it (SPD paper, section 4.3).

    ``streamer`` walks the base weights in their original order. The main rank decides, so that all ranks
    agree to the bit.
    """
    wanted = [i for i, b in enumerate(plan.blocks) if b.recovery == "hg+b2b" and b.kv_group_order is None]
    if not wanted:
        return plan
    reader, runtime = streamer.reader, streamer.runtime
    settings = AttentionSettings.of(streamer.shape)
    x = streamer.embed(tokens)
    with progress_bar(runtime, "group heads", max(wanted) + 1, "block") as bar:
        for block in range(max(wanted) + 1):
            if block in wanted:
                order = None
                if runtime.is_main:
                    inputs = torch.cat(x, 1).float().cpu()
                    weights = {name: t.float() for name, t in reader.block(block).items()}
                    order = group_heads(weights, inputs, plan.base_model, plan.branches, settings)
                plan = plan.with_block(block, kv_group_order=runtime.from_main(order))
            x = streamer.advance(block, x)
            bar.update()
    return plan


def finish_folder(distilled: Path) -> Path:
    """Where the finishing pass after the distillation in the folder ``distilled`` keeps its blocks."""
    return distilled.with_name("finish")


def distill_settings(options: TrainingOptions, max_seconds: float | None) -> DistillSettings:
    """The recipe's settings from the command's options. ``max_seconds``: for all training; half of it is for units
    where a finishing pass follows, which may take what they leave."""
    if max_seconds is not None and options.finish not in (None, "none"):
        max_seconds /= 2
    return DistillSettings(
        _engine_settings(options, options.learning_rate),
        options.epochs,
        options.distill_tokens,
        seed=options.seed,
        max_seconds=max_seconds,
        loss=options.loss,
        inputs=options.inputs,
    )


def finish_settings(options: TrainingOptions, max_seconds: float | None) -> FinishSettings | None:
    """The finishing pass's settings from the command's options, None for ``--finish none``. ``max_seconds``: what
    is left for it. One pass over the training pieces unless ``--finish-tokens`` says otherwise."""
    which = options.finish
    if which is None or which == "none":
        return None
    return FinishSettings(
        _engine_settings(options, options.finish_learning_rate),
        1,
        options.finish_tokens,
        seed=options.seed,
        max_seconds=max_seconds,
        which=which,
        recompute=options.finish_recompute,
    )


def _engine_settings(options: TrainingOptions, learning_rate: float) -> EngineSettings:
    return EngineSettings(
        learning_rate=learning_rate,
        micro_batch_size=options.micro_batch_size,
        gradient_accumulation=options.gradient_accumulation,
        gradient_clipping=1.0,
        weight_decay=0.0,
        warmup_ratio=0.05,
        zero_stage=options.zero_stage,
        dtype=options.dtype,
        config_file=options.deepspeed_config,
    )


@dataclass(frozen=True)
class TrainingText:
    """Pieces [n, s] to distil units on, and for the finishing pass."""

    units: Tensor
    finish: Tensor

    @classmethod
    def of(
        cls, reader: CheckpointReader, options: DataOptions, pieces: int, finishing: int | None
    ) -> TrainingText:
        """The first ``pieces`` and ``finishing`` (None: as many) pieces of ``--data``."""
        whole = calibration_tokens(reader, options, max(pieces, finishing or pieces))
        return cls(whole[:pieces], whole[: finishing or pieces])

    def check(self, options: TrainingOptions, replicas: int) -> None:
        """Raise UserError unless the pieces are enough for ``options``."""
        distill_settings(options, None).check_amount(self.units, replicas)
        finishing = finish_settings(options, None)
        if finishing is not None:
            finishing.check_amount(self.finish, replicas)

    def __len__(self) -> int:
        return max(len(self.units), len(self.finish))


def training_stores(
    options: TrainingOptions,
    plan: SPDPlan,
    text: TrainingText,
    folder: Path,
    runtime: Runtime,
    initial: str = "",
) -> tuple[UnitStore, FinishStore | None]:
    """The folders ``distill`` and, with ``--finish``, ``finish`` below ``folder`` for the training of ``plan`` on
    ``text``, after a check that it is enough. ``initial``: a name or hash of the weights that students start
    from, where the plan does not say it all. Raises UserError for too little text and if a folder holds another
    training."""
    text.check(options, runtime.dp_size)
    settings, finishing = distill_settings(options, None), finish_settings(options, None)
    tokens = text.units
    identity = settings.identity(plan, tokens, initial)
    units = UnitStore(folder / "distill", identity, runtime)
    if finishing is None:
        return units, None
    return units, FinishStore(
        finish_folder(units.folder), finishing.identity(plan, text.finish, identity), runtime
    )


def run_training(
    reader: CheckpointReader,
    runtime: Runtime,
    plan: SPDPlan,
    text: TrainingText,
    options: TrainingOptions,
    stores: tuple[UnitStore, FinishStore | None],
    tracker: Tracker,
    seconds: float | None = None,
    initial: BlockWeights | None = None,
) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """Distil the plan's units, then make the finishing pass, within ``seconds``: the records of the units and of
    the pass (None without one). ``initial``: what students start from (default: the base weights in the plan's
    order)."""
    started = time.monotonic()
    initial = initial or final_weights(reader, plan)
    units, finished = stores
    settings = distill_settings(options, seconds)
    records = run_distillation(reader, runtime, plan, text.units, settings, units, tracker, initial)
    left = None if seconds is None else max(0.0, seconds - (time.monotonic() - started))
    finishing = finish_settings(options, left)
    if finished is None or finishing is None:
        return records, None
    weights = trained_weights([units.folder], initial)
    teacher = _teacher(reader, runtime, finishing.engine)
    return records, finish(teacher, plan, text.finish, finishing, finished, tracker, weights)


def run_distillation(
    reader: CheckpointReader,
    runtime: Runtime,
    plan: SPDPlan,
    tokens: Tensor,
    settings: DistillSettings,
    store: UnitStore,
    tracker: Tracker,
    initial: BlockWeights,
) -> list[dict[str, Any]]:
    """Distil the plan's units into ``store``, started from ``initial``; the records of all of them."""
    teacher = _teacher(reader, runtime, settings.engine)
    records = distill(teacher, plan, tokens, settings, store, tracker, initial)
    for record in records:
        asked = [r for block in record["blocks"] if (r := plan.blocks[block].recovery).endswith("b2b")]
        strongest = max(asked, key=len)
        record["recovery"] = strongest if record["kept"] else untrained_recovery(strongest)
    return records


def untrained_recovery(planned: str) -> str:
    """What is left of a recovery with distillation where that was of no use."""
    return "grouped" if planned.startswith("grouped") else "zs"


def _teacher(reader: CheckpointReader, runtime: Runtime, engine: EngineSettings) -> BlockStreamer:
    return make_streamer(reader, runtime, dtype=engine.dtype, micro_batch=engine.micro_batch_size)


def write_export(
    reader: CheckpointReader, runtime: Runtime, plan: SPDPlan, weights: BlockWeights, out: Path
) -> SPDPlan:
    """Export the model on the main rank and return the plan as exported: with the package versions."""
    plan = plan.with_provenance(versions=package_versions())
    if runtime.is_main:
        export(reader, plan, weights, out)
    runtime.barrier()
    return plan


def package_versions() -> dict[str, str]:
    """Versions of what computes the weights."""
    found = {"megatron_spd": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def activation_bytes(reader: CheckpointReader) -> int:
    """Bytes of an element of the model's activations."""
    return reader.dtype(reader.family.final_norm).itemsize


def traffic(plan: SPDPlan, itemsize: int) -> dict[str, dict[str, int]]:
    """All-reduces and bytes that enter them, for each token and rank, before and after (blocks only; the
    embedding's all-reduce and the output layer's gather stay as they are). ``itemsize``: bytes of an
    activation element; a low-bit point counts the mean of what both of its steps send."""
    before, after = len(plan.sync_points), plan.collectives_per_forward()
    hidden, low_bit = plan.base_model.hidden_size, plan.low_bit
    sizes = [CollectiveFormat.parse(c).bytes_per_value for c in low_bit.values()]
    left = (after - len(low_bit)) * itemsize + sum(sizes)
    return {
        "all_reduces_per_token": {"before": before, "after": after},
        "bytes_per_token": {"before": before * hidden * itemsize, "after": round(left * hidden)},
    }
