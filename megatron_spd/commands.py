"""The commands of the command line: options in, a JSON-able result out. Each runs on every launched rank; the
main one writes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from megatron_spd import stages
from megatron_spd.checkpoint.hf import CheckpointReader
from megatron_spd.config import (
    DistillOptions,
    EvaluateOptions,
    ExportOptions,
    GenerateOptions,
    GroupOptions,
    PlanOptions,
    PrepareOptions,
    ReportOptions,
    RunOptions,
    SensitivityOptions,
)
from megatron_spd.distill.tracking import Tracker
from megatron_spd.distill.units import UnitStore, check_distilled_for
from megatron_spd.errors import UserError
from megatron_spd.evaluate.folders import check_same_vocabulary, measure_folders
from megatron_spd.evaluate.tasks import load_tasks, task_names
from megatron_spd.files import write_text_atomic
from megatron_spd.plan import SPDPlan
from megatron_spd.report.evaluation import evaluation_text
from megatron_spd.report.plots import plot_sensitivity
from megatron_spd.report.tables import dropped_in_words, sensitivity_table, summary_table
from megatron_spd.runtime.distributed import Runtime, initialize, shutdown
from megatron_spd.sensitivity.sweep import sweep
from megatron_spd.sensitivity.tiers import find_thresholds, scores_from


def prepare(options: PrepareOptions) -> dict[str, Any]:
    """See PrepareOptions."""
    from megatron_spd.checkpoint.prepare import prepare as prepare_folder

    result = prepare_folder(options.model, Path(options.out))
    return {**result, "text": f"{options.model} is ready in {options.out}"}


def sensitivity(options: SensitivityOptions) -> dict[str, Any]:
    """See SensitivityOptions."""
    reader = _plain_model(options.model)
    base = reader.base_model()
    stages.check_ranks(base, options.ranks, options.branches)
    plan = None if options.plan is None else stages.load_plan(options.plan, reader)
    tokens = stages.calibration_tokens(reader, options)
    out = _output_file(options.out)
    runtime = initialize()
    streamer = stages.make_streamer(reader, runtime, plan, dtype=options.dtype)
    unfinished = out.with_name(out.name + ".unfinished")
    order = "" if plan is None else plan.to_json()
    result = sweep(streamer, tokens, options.branches, options.method, options.sync_points, unfinished, order)
    result |= {"fingerprint": base.fingerprint, "model": options.model, "data": options.data or "embedded"}
    if runtime.is_main:
        _write_json(out, result)
        plot = out.with_suffix(".png")
        plot_sensitivity(result, find_thresholds(_any_scores(result)), plot)
        result |= {"out": str(out), "plot": str(plot)}
    shutdown()
    return {**result, "text": sensitivity_table(result)}


def _any_scores(result: dict[str, Any]) -> dict[int, float]:
    which = "attention" if result["method"] == "algorithm1" else result["sync_points"]
    return scores_from(result, which)


def plan(options: PlanOptions) -> dict[str, Any]:
    """See PlanOptions."""
    reader = _plain_model(options.model)
    path = Path(options.sensitivity)
    if not path.is_file():
        raise UserError(f"no sensitivity file at {path}; make one with `megatron-spd sensitivity`")
    out = _output_file(options.out)
    try:
        measured = dict(json.loads(path.read_text(encoding="utf-8")))
        made, thresholds = stages.choose_plan(
            reader.base_model(), options.branches, measured, options, options.model
        )
    except UserError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not a sensitivity file ({error!r}); make one with `megatron-spd sensitivity`"
        ) from None
    made = made.with_provenance(
        sensitivity={k: measured.get(k) for k in ("data", "tokens", "method", "plain_perplexity")},
        thresholds=dataclasses.asdict(thresholds),
        versions=stages.package_versions(),
    )
    made.save(out)
    return {
        "out": options.out,
        "dropped": made.dropped,
        "thresholds": dataclasses.asdict(thresholds),
        "tiers": {i: b.tier for i, b in enumerate(made.blocks) if b.tier},
        "text": f"{len(made.dropped)} of {len(made.sync_points)} sync points dropped "
        f"({dropped_in_words(made.dropped)}); plan: {options.out}",
    }


def group(options: GroupOptions) -> dict[str, Any]:
    """See GroupOptions."""
    reader = _plain_model(options.model)
    given = stages.load_plan(options.plan, reader)
    tokens = stages.calibration_tokens(reader, options)
    out = _output_file(options.out)
    runtime = initialize()
    made = stages.group_plan(stages.make_streamer(reader, runtime), given, tokens)
    if runtime.is_main:
        made.save(out)
    shutdown()
    grouped = {i: b.kv_group_order for i, b in enumerate(made.blocks) if b.kv_group_order is not None}
    return {
        "out": options.out,
        "grouped": grouped,
        "text": f"{len(grouped)} blocks have grouped heads; plan: {options.out}",
    }


def distill(options: DistillOptions) -> dict[str, Any]:
    """See DistillOptions."""
    reader = _plain_model(options.model)
    given = stages.load_plan(options.plan, reader)
    runtime = _distillation_runtime(options, given.branches)
    tokens = stages.calibration_tokens(reader, options)
    seconds = None if options.max_minutes is None else options.max_minutes * 60
    settings = stages.distill_settings(options, seconds)
    settings.check_amount(len(tokens), runtime.dp_size)
    folder = Path(options.out)
    store = UnitStore(folder / "distill", settings.identity(given, tokens), runtime)
    with Tracker(options.tracking, folder, runtime.is_main) as tracker:
        tracker.config(dataclasses.asdict(options))
        tracker.plan_artifact(options.plan)
        records = stages.run_distillation(reader, runtime, given, tokens, settings, store, tracker)
        columns = ["blocks", "loss_before", "loss_after", "kept"]
        tracker.table("units", columns, [[str(r["blocks"]), *(r[c] for c in columns[1:])] for r in records])
    shutdown()
    kept = sum(r["kept"] for r in records)
    return {
        "out": str(folder),
        "units": records,
        "text": f"{len(records)} units distilled, {kept} improved on held-out text; weights: {folder / 'distill'}",
    }


def _distillation_runtime(options: DistillOptions | RunOptions, branches: int) -> Runtime:
    """Process groups with M = ``--tensor-parallel`` (default: all ranks); the other factor is data parallel."""
    size = options.tensor_parallel or options.ranks
    stages.check_ranks(_plain_model(options.model).base_model(), size, branches)
    return initialize(size, options.seed)


def export(options: ExportOptions) -> dict[str, Any]:
    """See ExportOptions."""
    reader = _plain_model(options.model)
    given = stages.load_plan(options.plan, reader)
    distilled = None if options.distilled is None else _distilled_folder(options.distilled, given)
    runtime = initialize()
    stages.write_export(reader, runtime, given, distilled, Path(options.out))
    shutdown()
    return {"out": options.out, "text": f"SPD model exported to {options.out}"}


def _distilled_folder(path: str, plan: SPDPlan) -> Path:
    folder = Path(path)
    folder = folder / "distill" if (folder / "distill").is_dir() else folder
    check_distilled_for(plan, folder)
    return folder


def evaluate(options: EvaluateOptions) -> dict[str, Any]:
    """See EvaluateOptions."""
    # Again: a launcher may have started more ranks than --ranks says.
    options.check_processes()
    reader = CheckpointReader(options.model)
    other = None if options.against is None else CheckpointReader(options.against)
    if other is not None:
        check_same_vocabulary(reader, other)
    for each in filter(None, (reader, other)):
        branches = None if each.plan is None else each.plan.branches
        stages.check_ranks(each.base_model(), options.ranks, branches)
    tasks = None if options.tasks is None else load_tasks(task_names(options.tasks))
    tokens = stages.calibration_tokens(reader, options)
    runtime = initialize()
    result = measure_folders(reader, other, tokens, runtime, tasks, options)
    shutdown()
    return {**result, "text": evaluation_text(result)}


def generate(options: GenerateOptions) -> dict[str, Any]:
    """See GenerateOptions."""
    from megatron_spd.evaluate.generate import generate_text

    text = generate_text(options.model, options.prompt, options.max_new_tokens)
    return {"prompt": options.prompt, "completion": text, "text": options.prompt + text}


def report(options: ReportOptions) -> dict[str, Any]:
    """See ReportOptions."""
    from megatron_spd.pipeline import read_results
    from megatron_spd.report.html import write_report

    folder = Path(options.run)
    paths = write_report(read_results(folder), folder / "report")
    return {"paths": {k: str(v) for k, v in paths.items()}, "text": f"report: {paths['html']}"}


def run(options: RunOptions) -> dict[str, Any]:
    """See RunOptions."""
    from megatron_spd.pipeline import run_pipeline

    reader = _plain_model(options.model)
    reader.base_model().check_branches(options.branches)
    runtime = _distillation_runtime(options, options.branches)
    results = run_pipeline(reader, runtime, options)
    shutdown()
    samples = results["samples"]
    text = [summary_table(results), "", f"prompt: {samples['prompt']}"]
    text += [f"{kind}: {samples[kind]}" for kind in ("plain", "spd")]
    return {**results, "text": "\n".join(text)}


def _plain_model(folder: str) -> CheckpointReader:
    reader = CheckpointReader(folder)
    if reader.plan is not None:
        raise UserError(f"{folder} is an SPD export already; give the plain model it was made from")
    return reader


def _output_file(path: str) -> Path:
    file = Path(path)
    if file.is_dir():
        raise UserError(f"{path} is a folder; give the name of a file to write")
    file.parent.mkdir(parents=True, exist_ok=True)
    return file


def _write_json(path: Path, content: Any) -> None:
    write_text_atomic(path, json.dumps(content, indent=1) + "\n")
