"""The commands of the command line: options in, a JSON-able result out. Each runs on every launched rank; the
main one writes.

What draws (matplotlib) or generates text (transformers' generation) is imported where it is used: both take seconds
that every rank would spend.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from megatron_spd import stages
from megatron_spd.checkpoint.hf import CheckpointReader
from megatron_spd.compensation import (
    calibrate_into,
    calibration_pieces,
    check_calibrated_for,
    chosen_ingredients,
    measured_variants,
)
from megatron_spd.config import (
    BenchOptions,
    CollectivesOptions,
    ConvertOptions,
    CurveOptions,
    DistillOptions,
    DryRunOptions,
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
from megatron_spd.distill.units import check_distilled_for
from megatron_spd.errors import UserError
from megatron_spd.files import write_text_atomic
from megatron_spd.optimizing import choose_or_optimize
from megatron_spd.plan import BRANCH_FLAGS, BaseModel, SPDPlan
from megatron_spd.planning import SetSearch, make_search, read_scores
from megatron_spd.report.evaluation import evaluation_text
from megatron_spd.report.optimized import optimized_text
from megatron_spd.report.tables import dropped_in_words, low_bit_note, sensitivity_table, summary_table
from megatron_spd.runtime.distributed import Runtime, initialize, shutdown
from megatron_spd.sensitivity.sweep import sweep
from megatron_spd.sensitivity.tiers import find_thresholds, low_bit_scores, scores_from


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
    if options.grouped and options.plan is not None:
        raise UserError(
            "--grouped and --plan exclude each other: grouping finds its own orders; give one of them"
        )
    plan = None if options.plan is None else stages.load_plan(options.plan, reader)
    tokens = stages.calibration_tokens(reader, options)
    out = _output_file(options.out)
    runtime = initialize()
    streamer = stages.make_streamer(reader, runtime, plan, dtype=options.dtype)
    unfinished = out.with_name(out.name + ".unfinished")
    variants, order = measured_variants(streamer, options.branches, options, options.grouped)
    order += "" if plan is None else plan.to_json()
    result = sweep(
        streamer,
        tokens,
        options.branches,
        options.method,
        options.sync_points,
        unfinished,
        order,
        variants,
        options.measure or ("kl" if options.grouped or options.formats else "perplexity"),
        options.formats,
    )
    result |= {"fingerprint": base.fingerprint, "model": options.model, "data": options.data or "embedded"}
    result |= {"grouped": options.grouped}
    if runtime.is_main:
        _write_json(out, result)
        from megatron_spd.report.plots import plot_sensitivity

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
    measured = _read_sensitivity(options.sensitivity)
    base = reader.base_model()
    out = _output_file(options.out)
    try:
        read_scores(base, options.branches, measured, options, options.model)
        low_bit_scores(measured, options.sync_points, options.formats)
    except UserError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{options.sensitivity} is not a sensitivity file ({error!r}); make one with `megatron-spd sensitivity`"
        ) from None
    stages.check_ranks(base, options.ranks, options.branches)
    runtime = initialize()
    search = None
    if options.sets_to_measure:
        search = _make_search(reader, runtime, options, out.with_name(out.name + ".search.json"))
    choice = choose_or_optimize(reader, options.branches, measured, options, search)
    thresholds = dataclasses.asdict(choice.thresholds)
    made = choice.plan.with_provenance(
        sensitivity={k: measured.get(k) for k in ("data", "tokens", "method", "plain_perplexity", "grouped")},
        thresholds=thresholds,
        search=choice.search,
        optimized=choice.optimized,
        versions=stages.package_versions(),
    )
    if runtime.is_main:
        made.save(out)
    shutdown()
    return {
        "out": options.out,
        "dropped": made.dropped,
        "low_bit": made.low_bit,
        "thresholds": thresholds,
        "search": choice.search,
        "optimized": choice.optimized,
        "tiers": {i: b.tier for i, b in enumerate(made.blocks) if b.tier},
        "text": f"{len(made.dropped)} of {len(made.sync_points)} sync points dropped "
        f"({dropped_in_words(made.dropped)}){low_bit_note(made.low_bit)}; plan: {options.out}"
        + ("" if choice.optimized is None else f"\n{optimized_text(choice.optimized)}"),
    }


def dry_run(options: DryRunOptions) -> dict[str, Any]:
    """See DryRunOptions."""
    from megatron_spd.report.dry_run import dry_run_text
    from megatron_spd.scale.dry_run import dry_run as estimate

    result = estimate(options)
    return {**result, "text": dry_run_text(result)}


def _read_sensitivity(name: str) -> dict[str, Any]:
    path = Path(name)
    if not path.is_file():
        raise UserError(f"no sensitivity file at {path}; make one with `megatron-spd sensitivity`")
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{path} is not a sensitivity file ({error!r}); make one with `megatron-spd sensitivity`"
        ) from None


def _make_search(reader: CheckpointReader, runtime: Runtime, options: PlanOptions, state: Path) -> SetSearch:
    """A search on the first pieces of the text; grouped sets are calibrated on the pieces after them."""
    tokens = stages.calibration_tokens(reader, options)
    streamer = stages.make_streamer(reader, runtime)
    variants, grouping = measured_variants(streamer, options.branches, options, options.grouped)
    return make_search(streamer, options.branches, variants, tokens, options.sets_to_measure, state, grouping)


def group(options: GroupOptions) -> dict[str, Any]:
    """See GroupOptions."""
    reader = _plain_model(options.model)
    given = stages.load_plan(options.plan, reader)
    out = _output_file(options.out)
    runtime = initialize()
    streamer = stages.make_streamer(reader, runtime)
    records: list[dict[str, Any]] = []
    if options.calibrated is None:
        made = stages.group_plan(streamer, given, stages.calibration_tokens(reader, options))
    else:
        tokens = calibration_pieces(reader, options)
        made, records = calibrate_into(
            streamer, given, tokens, chosen_ingredients(options), Path(options.calibrated)
        )
    if runtime.is_main:
        made.save(out)
    shutdown()
    grouped = [i for i, b in enumerate(made.blocks) if b.kv_group_order or b.neuron_order]
    where = "" if options.calibrated is None else f"; calibrated blocks: {options.calibrated}"
    return {
        "out": options.out,
        "grouped": grouped,
        "blocks": records,
        "text": f"{len(grouped)} blocks have grouped heads or neurons; plan: {options.out}{where}",
    }


def distill(options: DistillOptions) -> dict[str, Any]:
    """See DistillOptions."""
    reader = _plain_model(options.model)
    given = stages.load_plan(options.plan, reader)
    runtime = _distillation_runtime(options, reader.base_model(), given.branches)
    text = stages.TrainingText.of(reader, options, options.sequences, options.finish_sequences)
    seconds = None if options.max_minutes is None else options.max_minutes * 60
    folder = Path(options.out)
    calibrated = _calibrated_folder(options.calibrated, given)
    mark = "" if calibrated is None else (calibrated / "identity").read_text(encoding="utf-8")
    stores = stages.training_stores(options, given, text, folder, runtime, mark)
    with Tracker(options.tracking, folder, runtime.is_main) as tracker:
        tracker.config(dataclasses.asdict(options))
        tracker.plan_artifact(options.plan)
        records, finished = stages.run_training(
            reader,
            runtime,
            given,
            text,
            options,
            stores,
            tracker,
            seconds,
            stages.final_weights(reader, given, calibrated=calibrated),
        )
        columns = ["blocks", "loss_before", "loss_after", "kept"]
        tracker.table("units", columns, [[str(r["blocks"]), *(r[c] for c in columns[1:])] for r in records])
    shutdown()
    kept = sum(r["kept"] for r in records)
    last = "" if finished is None else f", last pass {'kept' if finished['kept'] else 'of no use'}"
    return {
        "out": str(folder),
        "units": records,
        "finish": finished,
        "text": f"{len(records)} units distilled, {kept} improved on held-out text{last}; "
        f"weights: {folder / 'distill'}",
    }


def _distillation_runtime(
    options: DistillOptions | RunOptions | CurveOptions, base: BaseModel, branches: int
) -> Runtime:
    """Process groups with M = ``--tensor-parallel`` (default: all ranks); the other factor is data parallel."""
    size = options.tensor_parallel or options.ranks
    stages.check_ranks(base, size, branches)
    return initialize(size, options.seed)


def export(options: ExportOptions) -> dict[str, Any]:
    """See ExportOptions."""
    reader = _plain_model(options.model)
    given = stages.load_plan(options.plan, reader)
    distilled = None if options.distilled is None else _distilled_folder(options.distilled, given)
    calibrated = _calibrated_folder(options.calibrated, given)
    runtime = initialize()
    weights = stages.final_weights(reader, given, distilled, calibrated)
    if options.kept_collectives is not None:
        given = given.with_collectives(*options.kept_collectives)
    stages.write_export(reader, runtime, given, weights, Path(options.out))
    shutdown()
    return {
        "out": options.out,
        "low_bit": given.low_bit,
        "text": f"SPD model exported to {options.out}{low_bit_note(given.low_bit)}",
    }


def _distilled_folder(path: str, plan: SPDPlan) -> Path:
    folder = Path(path)
    folder = folder / "distill" if (folder / "distill").is_dir() else folder
    check_distilled_for(plan, folder)
    return folder


def _calibrated_folder(path: str | None, plan: SPDPlan) -> Path | None:
    """``--calibrated``, which a plan with shifts or branch norms (a re-fit has them) cannot do without: their values
    are nowhere else."""
    if path is None:
        needed = [i for i, b in enumerate(plan.blocks) if any(getattr(b, name) for name in BRANCH_FLAGS)]
        if needed:
            raise UserError(
                f"the plan has shifts or norms (first: block {needed[0]}) whose values lie in the folder that "
                "`megatron-spd group --calibrated` wrote; give it as --calibrated"
            )
        return None
    return check_calibrated_for(plan, Path(path))


def evaluate(options: EvaluateOptions) -> dict[str, Any]:
    """See EvaluateOptions."""
    from megatron_spd.evaluate.folders import check_same_vocabulary, measure_folders
    from megatron_spd.evaluate.tasks import load_tasks, task_names

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
    from megatron_spd.report.curve import CURVE_FILE, write_curve_report
    from megatron_spd.report.run import write_report

    folder = Path(options.run)
    curve = folder / CURVE_FILE
    if curve.is_file():
        paths = write_curve_report(json.loads(curve.read_text(encoding="utf-8")), folder)
    else:
        paths = write_report(read_results(folder), folder / "report")
    return {"paths": {k: str(v) for k, v in paths.items()}, "text": f"report: {paths['html']}"}


def run(options: RunOptions) -> dict[str, Any]:
    """See RunOptions."""
    from megatron_spd.pipeline import run_pipeline

    reader = _plain_model(options.model)
    base = reader.base_model()
    base.check_branches(options.branches)
    runtime = _distillation_runtime(options, base, options.branches)
    results = run_pipeline(reader, runtime, options)
    shutdown()
    samples = results["samples"]
    text = [summary_table(results), "", f"prompt: {samples['prompt']}"]
    text += [f"{kind}: {samples[kind]}" for kind in ("plain", "spd")]
    return {**results, "text": "\n".join(text)}


def curve(options: CurveOptions) -> dict[str, Any]:
    """See CurveOptions."""
    from megatron_spd.curve import run_curve
    from megatron_spd.report.curve import curve_text

    reader = _plain_model(options.model)
    base = reader.base_model()
    base.check_branches(options.branches)
    runtime = _distillation_runtime(options, base, options.branches)
    result = run_curve(reader, runtime, options)
    shutdown()
    return {**result, "text": curve_text(result)}


def bench(options: BenchOptions) -> dict[str, Any]:
    """See BenchOptions."""
    from megatron_spd.latency.command import bench_model
    from megatron_spd.report.latency import latency_text, write_latency_report

    result, is_main = bench_model(options)
    paths = write_latency_report(result, Path(options.out)) if is_main else {}
    return {**result, "paths": paths, "text": latency_text(result, paths)}


def collectives(options: CollectivesOptions) -> dict[str, Any]:
    """See CollectivesOptions."""
    from megatron_spd.latency.messages import run_messages
    from megatron_spd.report.latency import messages_text

    out = None if options.out is None else _output_file(options.out)
    result, is_main = run_messages(options)
    if out is not None and is_main:
        _write_json(out, result)
    return {**result, "text": messages_text(result)}


def convert(options: ConvertOptions) -> dict[str, Any]:
    """See ConvertOptions."""
    from megatron_spd.converting import convert as convert_folder

    result = convert_folder(options)
    kind = "plain model" if result["branches"] is None else f"SPD model of {result['branches']} branches"
    return {**result, "text": f"{kind} written to {result['output']} ({options.to_format})"}


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
