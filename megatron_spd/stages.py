"""The stages of making an SPD model, as the commands and ``run`` call them. Every function is called on all ranks."""

from __future__ import annotations

import platform
from collections.abc import Mapping
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
from megatron_spd.config import DataOptions, SelectionOptions, TrainingOptions
from megatron_spd.distill.engine import EngineSettings
from megatron_spd.distill.recipe import DistillSettings, distill
from megatron_spd.distill.tracking import Tracker
from megatron_spd.distill.units import UnitStore, distilled_block
from megatron_spd.errors import UserError
from megatron_spd.grouping.heads import AttentionSettings, group_heads
from megatron_spd.grouping.permute import planned_weights
from megatron_spd.models.build import DTYPES, inverse_frequencies
from megatron_spd.plan import BaseModel, SPDPlan
from megatron_spd.progress import progress_bar
from megatron_spd.runtime.distributed import Runtime
from megatron_spd.sensitivity.tiers import (
    Thresholds,
    block_tiers,
    choose_points,
    drop_count,
    find_thresholds,
    points_up_to,
    points_within_budget,
    scores_from,
)

_PACKAGES = ("torch", "megatron-core", "deepspeed", "transformers")


def calibration_tokens(
    reader: CheckpointReader, options: DataOptions, sequences: int | None = None, skip: int = 0
) -> Tensor:
    """Token pieces [sequences, seq_length] of ``--data``; ``skip`` pieces are passed over first."""
    text = read_text(options.data)
    return token_batches(reader.tokenizer(), text, sequences or options.sequences, options.seq_length, skip)


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
    reader: CheckpointReader, plan: SPDPlan | None, distilled: Path | None = None
) -> BlockWeights:
    """Block weights as they are run and exported (see :func:`make_streamer`)."""
    if reader.plan is not None or plan is None:
        return reader.block
    permuted = planned_weights(reader, plan)

    def weights(block: int) -> Mapping[str, Tensor]:
        trained = distilled_block(distilled, block) if distilled is not None else None
        return permuted(block) if trained is None else trained

    return weights


def choose_plan(
    base: BaseModel, branches: int, sensitivity: Mapping[str, Any], options: SelectionOptions, name: str
) -> tuple[SPDPlan, Thresholds]:
    """The plan that ``options`` make of a sensitivity measurement, and the tier thresholds used.

    Points: a ratio or count of the least sensitive ones, a perplexity budget, or, if none is given, all
    points but the extremely sensitive. Raises UserError if the measurement is of another model or G, or lacks
    scores.
    """
    base.check_branches(branches)
    if sensitivity.get("fingerprint") not in (None, base.fingerprint):
        raise UserError(
            f"the sensitivity file is of another model than {name}; measure again with `megatron-spd sensitivity`"
        )
    if sensitivity["branches"] != branches:
        raise UserError(
            f"the sensitivity file was measured with G = {sensitivity['branches']}, not G = {branches}; measure again"
        )
    scores = scores_from(sensitivity, options.sync_points)
    if options.tau1 is not None and options.tau2 is not None:
        thresholds = Thresholds(options.tau1, options.tau2)
    else:
        thresholds = find_thresholds(scores)
    spread = options.sync_points != "attention"
    if options.max_perplexity_increase is not None:
        plain = sensitivity["plain_perplexity"]
        dropped = points_within_budget(scores, plain, options.max_perplexity_increase, spread)
    elif options.drop_count is not None or options.drop_ratio is not None:
        count = options.drop_count
        if count is None:
            count = drop_count(len(scores), options.drop_ratio or 0.0)
        dropped = choose_points(scores, count, spread)
    else:
        dropped = points_up_to(scores, thresholds.tau2)
    plan = SPDPlan.dense(base, branches).with_drops(dropped)
    recovery = {"ISB": "zs", "SB": "b2b", "ESB": "hg+b2b"}
    for block, tier in block_tiers(scores, dropped, thresholds).items():
        plan = plan.with_block(
            block, tier=tier, recovery="zs" if options.recovery == "zs" else recovery[tier]
        )
    return plan, thresholds


def group_plan(streamer: BlockStreamer, plan: SPDPlan, tokens: Tensor) -> SPDPlan:
    """The plan with heads regrouped in every block whose recovery asks for it (SPD paper, section 4.3).

    ``streamer`` walks the base weights in their original order. The main rank decides, so that all ranks
    agree to the bit.
    """
    wanted = [i for i, b in enumerate(plan.blocks) if b.recovery == "hg+b2b" and b.kv_group_order is None]
    if not wanted:
        return plan
    reader, runtime = streamer.reader, streamer.runtime
    settings = AttentionSettings(
        reader.head_dim, inverse_frequencies(streamer.shape), reader.config["rms_norm_eps"]
    )
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


def distill_settings(options: TrainingOptions, max_seconds: float | None) -> DistillSettings:
    """The recipe's settings from the command's options."""
    engine = EngineSettings(
        learning_rate=options.learning_rate,
        micro_batch_size=options.micro_batch_size,
        gradient_accumulation=options.gradient_accumulation,
        gradient_clipping=1.0,
        weight_decay=0.0,
        warmup_ratio=0.05,
        zero_stage=options.zero_stage,
        dtype=options.dtype,
        config_file=options.deepspeed_config,
    )
    return DistillSettings(engine, options.epochs, options.loss, seed=options.seed, max_seconds=max_seconds)


def run_distillation(
    reader: CheckpointReader,
    runtime: Runtime,
    plan: SPDPlan,
    tokens: Tensor,
    settings: DistillSettings,
    store: UnitStore,
    tracker: Tracker,
) -> list[dict[str, Any]]:
    """Distil the plan's units into ``store``; the records of all of them."""
    streamer = make_streamer(
        reader, runtime, plan, dtype=settings.engine.dtype, micro_batch=settings.engine.micro_batch_size
    )
    records = distill(streamer, plan, tokens, settings, store, tracker)
    for record in records:
        record["recovery"] = plan.blocks[record["blocks"][-1]].recovery if record["kept"] else "zs"
    return records


def write_export(
    reader: CheckpointReader, runtime: Runtime, plan: SPDPlan, distilled: Path | None, out: Path
) -> SPDPlan:
    """Export the model on the main rank and return the plan as exported: with the package versions."""
    plan = plan.with_provenance(versions=package_versions())
    if runtime.is_main:
        export(reader, plan, final_weights(reader, plan, distilled), out)
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


def traffic(plan: SPDPlan, itemsize: int) -> dict[str, dict[str, int]]:
    """All-reduces and bytes that enter them, for each token and rank, before and after (blocks only; the
    embedding's all-reduce and the output layer's gather stay as they are). ``itemsize``: bytes of an
    activation element."""
    before, after = len(plan.sync_points), plan.collectives_per_forward()
    size = plan.base_model.hidden_size * itemsize
    return {
        "all_reduces_per_token": {"before": before, "after": after},
        "bytes_per_token": {"before": before * size, "after": after * size},
    }
