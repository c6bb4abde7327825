"""The report of a run: one self-contained ``report.html``, the same as ``report.md``, and the pictures.

The *results* dict, all but the first five optional (None or missing where a run did not measure it):

``model``, ``branches`` (G), ``ranks`` (M), ``sync_points_total`` (2L), ``dropped`` (points); ``low_bit`` {point:
format}; ``recovery``; ``perplexity`` {plain, zero_shot, grouped, final}; ``interval`` {the same: [low, high]} and
``increase`` {all but plain: [percent, low, high]}, paired against plain, both at 95 %; ``all_reduces_per_token`` and
``bytes_per_token`` {before, after}; ``stage_seconds`` {stage: s}; ``paths`` {what: path}; ``search`` (see
``report/search.py``); ``optimized`` (see ``report/optimized.py``); ``calibration`` [records] (see
``report/calibration.py``); ``units`` [{blocks, recovery, loss_before, loss_after, losses}]; ``finish`` (the record of
``distill/finish.py``); ``samples`` {prompt, plain, spd}; ``tiers`` {block: tier}; ``thresholds`` {tau1, tau2};
``sensitivity`` (the sweep's JSON); ``notes`` [text].
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_spd.report import plots, tables
from megatron_spd.report.calibration import calibration_section, has_choices, plot_guard
from megatron_spd.report.document import Section, Table, pictures_of, write_document
from megatron_spd.report.finishing import finishing_section, plot_finish
from megatron_spd.report.optimized import optimized_section
from megatron_spd.report.search import has_measurements, plot_search, search_section
from megatron_spd.sensitivity.tiers import Thresholds

_BY_DIVERGENCE = (
    "Perplexities here stand for the divergence from the plain model's predictions: plain x exp(KL). That is far less "
    "noisy than the perplexity itself and never falls below plain."
)


def write_report(results: Mapping[str, Any], out_dir: Path) -> dict[str, Path]:
    """Write the report into ``out_dir`` (made if missing), every file whole or not at all.

    Returns:
        Paths under ``html`` and ``markdown``, and of the pictures drawn: ``perplexity``, ``sensitivity``, ``search``,
        ``guard``, ``losses``, ``finish``.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    pictures = _draw(results, out_dir)
    title = f"SPD report: {results.get('model', 'model')}"
    return pictures | write_document(title, _sections(results, pictures), out_dir, "report")


def _draw(results: Mapping[str, Any], out_dir: Path) -> dict[str, Path]:
    """Whichever pictures the results have numbers for."""
    pictures = {}
    if any((results.get("perplexity") or {}).values()):
        pictures["perplexity"] = plots.plot_perplexity(
            results["perplexity"], out_dir / "perplexity.png", results.get("interval")
        )
    sensitivity = results.get("sensitivity") or {}
    if sensitivity.get("algorithm1") or sensitivity.get("single"):
        given = results.get("thresholds")
        limits = Thresholds(given["tau1"], given["tau2"]) if given else None
        pictures["sensitivity"] = plots.plot_sensitivity(
            sensitivity, limits, out_dir / "sensitivity.png", results.get("dropped") or ()
        )
    if (search := results.get("search")) and has_measurements(search):
        pictures["search"] = plot_search(search, out_dir / "search.png")
    if (records := results.get("calibration")) and has_choices(records):
        pictures["guard"] = plot_guard(records, out_dir / "guard.png")
    if any(unit.get("losses") for unit in results.get("units") or ()):
        pictures["losses"] = plots.plot_losses(results["units"], out_dir / "losses.png")
    if (finish := results.get("finish")) and finish["losses"]:
        pictures["finish"] = plot_finish(finish, out_dir / "finish.png")
    return pictures


def _sections(results: Mapping[str, Any], pictures: Mapping[str, Path]) -> list[Section]:
    """The report as data; sections without content are left out."""
    sections = [_result_section(results, pictures)]
    if samples := results.get("samples"):
        labels = {"prompt": "Prompt", "plain": "Plain model", "spd": "SPD model"}
        sections.append(
            Section("Generated text", quotes=[(labels[k], samples[k]) for k in labels if k in samples])
        )
    if results.get("tiers"):
        sections.append(_tier_section(results))
    if search := results.get("search"):
        sections.append(search_section(search, pictures))
    if optimized := results.get("optimized"):
        sections.append(optimized_section(optimized))
    if records := results.get("calibration"):
        sections.append(calibration_section(records, pictures))
    if results.get("units"):
        rows = tables.unit_rows(results)
        drawn = pictures_of(pictures, losses="Loss of every unit over its steps, and before and after")
        sections.append(
            Section("Block-to-block distillation", tables=[Table(tables.UNIT_HEADER, rows)], pictures=drawn)
        )
    if finish := results.get("finish"):
        sections.append(finishing_section(finish, pictures))
    if results.get("sensitivity"):
        header, rows = tables.sensitivity_rows(results["sensitivity"])
        drawn = pictures_of(pictures, sensitivity="Rise in perplexity per sync point")
        sections.append(
            Section(
                "Sensitivity of the sync points",
                [_BY_DIVERGENCE] if results["sensitivity"].get("measure") == "kl" else [],
                tables=[Table(header, rows)],
                pictures=drawn,
            )
        )
    if stages := tables.stage_rows(results):
        sections.append(Section("Wall time", tables=[Table(("stage", "wall time"), stages)]))
    if paths := results.get("paths"):
        files = [(name, str(path)) for name, path in paths.items()]
        sections.append(Section("Files", tables=[Table(("", "path"), files)]))
    return sections


def _result_section(results: Mapping[str, Any], pictures: Mapping[str, Path]) -> Section:
    dropped = results.get("dropped") or ()
    total, recovery = tables.number(results.get("sync_points_total")), results.get("recovery")
    about = (
        f"{results.get('model', 'The model')} with G = {results.get('branches', '?')} branches, run on "
        f"M = {results.get('ranks', '?')} tensor-parallel ranks. {len(dropped)} of {total} sync points are dropped: "
        f"{tables.dropped_in_words(dropped)}{tables.low_bit_note(results.get('low_bit'))}."
        f"{f' Recovery: {recovery}.' if recovery else ''}"
    )
    shown = [Table(*tables.summary(results))]
    if intervals := tables.interval_rows(results):
        shown.append(Table(tables.INTERVAL_HEADER, intervals))
    return Section(
        "Result",
        [about, *results.get("notes", ())],
        shown,
        pictures_of(pictures, perplexity="Perplexity of the plain and of the SPD model"),
    )


def _tier_section(results: Mapping[str, Any]) -> Section:
    names = {block: tier for block, tier in results["tiers"].items() if tier}
    rows = []
    for tier, label in plots.TIER_NAMES.items():
        blocks = [int(block) for block, name in names.items() if name == tier]
        rows.append((label, str(len(blocks)), tables.ranges(blocks) or tables.MISSING))
    given = results.get("thresholds")
    text = f"tau1 = {tables.number(given['tau1'])}, tau2 = {tables.number(given['tau2'])}." if given else ""
    return Section(
        "Tiers of the blocks with dropped points", [text] if text else [], [Table(("", "", "blocks"), rows)]
    )
