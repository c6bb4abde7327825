"""Perplexity and accuracy against the share of dropped sync points: the report of ``megatron-spd curve``.

A *curve* dict, as it stands in ``curve.json``: ``model``; ``branches`` (G); ``key_value_groups``; ``sync_points``
(attention, mlp, any); ``sync_points_total`` (2L); ``plain`` {perplexity, interval, tasks}; ``cells``, one for every
variant and ratio: ``variant``, ``ratio``, ``dropped`` (points), ``perplexity``, ``interval`` [low, high], ``increase``
[percent, low, high] over plain, paired by sequence, ``tasks``; ``orders`` (see ``sensitivity/orders.py``) or None;
``notes``. ``tasks`` is what ``evaluate/tasks.py`` measures, or None. All intervals are at 95 %.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_spd.report.document import Section, Table, pictures_of, write_document
from megatron_spd.report.tables import MISSING, bounds, number, percent, percent_bounds, text_table

#: The curve's file in its folder.
CURVE_FILE = "curve.json"

#: Variants in the order of the legend, by their names in ``cells``.
LABELS = {
    "zero-shot": "zero-shot",
    "shift": "+ shift",
    "heads": "+ heads (published)",
    "neurons": "+ neurons",
    "all": "+ all",
    "b2b": "+ all, distilled",
    "finish": "+ all, distilled, finished",
}

Curve = Mapping[str, Any]
Cells = dict[tuple[str, float], Mapping[str, Any]]


def write_curve_report(curve: Curve, folder: Path) -> dict[str, Path]:
    """Draw ``curve.png`` (and ``orders.png``) and write ``curve.html`` and ``curve.md`` into ``folder``, each whole or
    not at all; their paths under ``curve``, ``orders``, ``html`` and ``markdown``."""
    # matplotlib takes seconds to import, which ranks that only measure are spared.
    from megatron_spd.report.curve_plots import plot_curve, plot_orders

    folder.mkdir(parents=True, exist_ok=True)
    pictures = {"curve": plot_curve(curve, LABELS, folder / "curve.png")}
    if curve["orders"] is not None:
        pictures["orders"] = plot_orders(curve["orders"], folder / "orders.png")
    title = f"SPD curve: {curve['model']}, G = {curve['branches']}"
    return pictures | write_document(title, _sections(curve, pictures), folder, "curve")


def curve_text(curve: Curve) -> str:
    """What ``megatron-spd curve`` prints at its end."""
    plain = curve["plain"]
    head = f"{curve['model']}, G = {curve['branches']}: plain perplexity {number(plain['perplexity'])}"
    parts = [head, "", text_table(*_matrix(curve, _perplexity))]
    for task in _tasks(curve):
        parts += ["", text_table(*_accuracy_matrix(curve, task))]
    if curve["orders"] is not None:
        parts += ["", text_table(ORDER_HEADER, order_rows(curve)), _orders_in_words(curve["orders"])]
    if paths := curve.get("paths"):
        width = max(map(len, paths))
        parts += ["", *(f"{name.ljust(width)}  {path}" for name, path in paths.items())]
    return "\n".join(parts)


def _sections(curve: Curve, pictures: Mapping[str, Path]) -> list[Section]:
    plain = curve["plain"]
    about = (
        f"{curve['model']} with G = {curve['branches']} branches and {curve['sync_points_total']} sync points; points "
        f"that may be dropped: {curve['sync_points']}. Plain perplexity {number(plain['perplexity'])} "
        f"(95 %: {bounds(plain['interval'])})."
    )
    sections = [
        Section(
            "Perplexity",
            [about, *curve["notes"], *_notes(curve)],
            [Table(*_matrix(curve, _perplexity)), Table(CELL_HEADER, cell_rows(curve))],
            pictures_of(
                pictures, curve="Perplexity, and accuracy where measured, against dropped sync points"
            ),
        )
    ]
    if tasks := _tasks(curve):
        tables = [Table(*_accuracy_matrix(curve, task)) for task in tasks]
        sections.append(Section("Accuracy", ["Value and standard error."], tables))
    if (orders := curve["orders"]) is not None:
        sections.append(
            Section(
                "Order of sensitivity before and after grouping",
                [_orders_in_words(orders)],
                [Table(ORDER_HEADER, order_rows(curve))],
                pictures_of(pictures, orders="Sensitivity of every point before and after grouping"),
            )
        )
    return sections


def _notes(curve: Curve) -> list[str]:
    notes = [
        "Shift, neurons and all are kept for a block only where its held-out error is lower; published head grouping "
        "is applied wherever an attention point is dropped, as published."
    ]
    if curve["branches"] == curve["key_value_groups"]:
        notes.append(
            "Every branch has one key/value group here: grouping heads can only choose which group meets which part of "
            "the MLP."
        )
    return notes


# ---- tables ---------------------------------------------------------------------------------------------------------

CELL_HEADER = ("variant", "ratio", "dropped", "perplexity", "95 %", "increase", "95 %, paired")


def cell_rows(curve: Curve) -> list[tuple[str, ...]]:
    """(variant, ratio, points dropped, perplexity, its interval, increase over plain, its interval) of every cell."""
    return [
        (
            LABELS[cell["variant"]],
            f"{cell['ratio']:g}",
            str(len(cell["dropped"])),
            number(cell["perplexity"]),
            bounds(cell["interval"]),
            percent(cell["increase"][0]),
            percent_bounds(cell["increase"][1:]),
        )
        for cell in curve["cells"]
    ]


def _matrix(curve: Curve, form: Callable[[Mapping[str, Any]], str]) -> tuple[list[str], list[list[str]]]:
    """Variants by ratios, each cell written by ``form``; "-" where nothing was measured."""
    cells: Cells = {(c["variant"], c["ratio"]): c for c in curve["cells"]}
    counts = {c["ratio"]: len(c["dropped"]) for c in curve["cells"]}
    ratios = sorted(counts)
    header = ["dropped", *(f"{counts[r]} of {curve['sync_points_total']}" for r in ratios)]
    rows = []
    for variant, label in LABELS.items():
        found = [cells.get((variant, r)) for r in ratios]
        row = [MISSING if cell is None else form(cell) for cell in found]
        if any(value != MISSING for value in row):
            rows.append([label, *row])
    return header, rows


def _perplexity(cell: Mapping[str, Any]) -> str:
    return f"{number(cell['perplexity'])} ({percent(cell['increase'][0])})"


def _tasks(curve: Curve) -> list[str]:
    """The tasks that were measured and have an accuracy."""
    found = [curve["plain"]["tasks"], *(c["tasks"] for c in curve["cells"])]
    names = (name for tasks in found if tasks for name, metrics in tasks.items() if "acc" in metrics)
    return list(dict.fromkeys(names))


def _accuracy_matrix(curve: Curve, task: str) -> tuple[list[str], list[list[str]]]:
    def written(cell: Mapping[str, Any]) -> str:
        return accuracy_in_words((cell["tasks"] or {}).get(task))

    header, rows = _matrix(curve, written)
    plain = written(curve["plain"])
    return [task, *header[1:]], [["plain", *[plain] * (len(header) - 1)], *rows]


def accuracy_in_words(found: Mapping[str, Any] | None) -> str:
    """A task's accuracy with its standard error; "-" for a task without."""
    measured = (found or {}).get("acc")
    if measured is None:
        return MISSING
    error = "" if measured["stderr"] is None else f" +- {measured['stderr']:.3f}"
    return f"{measured['value']:.3f}{error}"


ORDER_HEADER = (
    "sync point",
    "block",
    "after",
    "sensitivity before",
    "after grouping",
    "rank before",
    "after",
)


def order_rows(curve: Curve) -> list[tuple[str, ...]]:
    """(point, block, sublayer, sensitivity before and after grouping, both ranks), the most sensitive after first."""
    points = sorted(curve["orders"]["points"], key=lambda p: -p["rank_after"])
    return [
        (
            str(p["point"]),
            str(p["point"] // 2),
            "MLP" if p["point"] % 2 else "attention",
            *(f"{p[key]:+.3f}" for key in ("before", "after")),
            *(f"{p[key]:g}" for key in ("rank_before", "rank_after")),
        )
        for p in points
    ]


def _orders_in_words(orders: Mapping[str, Any]) -> str:
    points, rho = orders["points"], orders["spearman"]
    moved = sum(abs(p["rank_before"] - p["rank_after"]) >= len(points) / 4 for p in points)
    lower = sum(p["after"] < p["before"] for p in points)
    return (
        f"Spearman correlation of the two orders: {MISSING if rho is None else f'{rho:.3f}'}. {moved} of {len(points)} "
        f"points move by a quarter of all ranks or more; {lower} cost less after grouping. Rank 1: the least sensitive."
    )
