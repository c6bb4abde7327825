"""The pictures of a curve (``report/curve.py`` says what a curve holds)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_spd.files import write_atomic
from megatron_spd.report.style import GREY, MARKERS, PALETTE, PLAIN, plain_log_ticks
from megatron_spd.report.tables import known_bounds, number

Curve = Mapping[str, Any]


def plot_curve(curve: Curve, labels: Mapping[str, str], path: Path) -> Path:
    """Perplexity over the share of dropped sync points, a line for every variant of ``labels`` that has cells; beside
    it mean task accuracy, where some was measured.

    Bars are 95 % intervals of the increase over plain, paired by sequence: those of the perplexities themselves say
    how hard the text is, and would hide every difference. Bars of accuracy are standard errors.
    """
    measured = any(mean_accuracy(c["tasks"]) for c in curve["cells"])
    figure = Figure(figsize=(14 if measured else 8.5, 5.4), layout="constrained", dpi=120)
    panels = figure.subplots(1, 2 if measured else 1, squeeze=False)[0]
    figure.suptitle(_title(curve), fontsize=11)
    for index, (variant, label) in enumerate(labels.items()):
        cells = sorted(
            (c for c in curve["cells"] if c["variant"] == variant), key=lambda c: len(c["dropped"])
        )
        look = {
            "color": PALETTE[index % len(PALETTE)],
            "marker": MARKERS[index % len(MARKERS)],
            "label": label,
            "markersize": 6,
            "linewidth": 1.6,
            "elinewidth": 1.2,
        }
        if cells:
            _draw_perplexity(panels[0], curve, cells, look)
        if measured:
            _draw_accuracy(panels[1], curve, cells, look)
    _finish_perplexity(panels[0], curve)
    if measured:
        _finish_accuracy(panels[1], curve)
    for axes in panels:
        axes.set_xlabel(f"share of the {curve['sync_points_total']} all-reduces that is dropped, %")
        axes.grid(alpha=0.3)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, fontsize=9)
    return write_atomic(path, figure.savefig)


def _title(curve: Curve) -> str:
    title = f"{curve['model']}, G = {curve['branches']} branches, sync points: {curve['sync_points']}"
    if curve["branches"] == curve["key_value_groups"]:
        title += (
            "\n(a key/value group for each branch: heads can only choose which part of the MLP they meet)"
        )
    return title


def mean_accuracy(tasks: Mapping[str, Any] | None) -> tuple[float, float] | None:
    """Mean accuracy of the tasks that have one, and its standard error (tasks are independent); None for none."""
    found = [task["acc"] for task in (tasks or {}).values() if "acc" in task]
    if not found:
        return None
    errors = [a["stderr"] or 0.0 for a in found]
    mean = sum(a["value"] for a in found) / len(found)
    return mean, math.sqrt(sum(e * e for e in errors)) / len(found)


def _share(curve: Curve, cell: Mapping[str, Any]) -> float:
    return 100 * len(cell["dropped"]) / curve["sync_points_total"]


def _draw_perplexity(
    axes: Axes, curve: Curve, cells: Sequence[Mapping[str, Any]], look: Mapping[str, Any]
) -> None:
    plain, ends = curve["plain"]["perplexity"], []
    for cell in cells:
        value = cell["perplexity"]
        interval = known_bounds(cell["increase"][1:])
        low, high = (plain * (1 + v / 100) for v in interval) if interval else (value, value)
        ends.append((max(0.0, value - low), max(0.0, high - value)))
    bars = list(zip(*ends, strict=True))
    axes.errorbar(
        [_share(curve, c) for c in cells], [c["perplexity"] for c in cells], yerr=bars, zorder=2, **look
    )


def _finish_perplexity(axes: Axes, curve: Curve) -> None:
    plain = curve["plain"]["perplexity"]
    axes.axhline(plain, color="black", linewidth=1, linestyle=":", label=f"plain ({number(plain)})")
    axes.set_yscale("log")
    plain_log_ticks(axes.yaxis)
    axes.set(ylabel="perplexity", title="Perplexity (bars: 95 %, paired with plain)")


def _draw_accuracy(
    axes: Axes, curve: Curve, cells: Sequence[Mapping[str, Any]], look: Mapping[str, Any]
) -> None:
    found = [(_share(curve, c), mean) for c in cells if (mean := mean_accuracy(c["tasks"]))]
    if found:
        shares, means = zip(*found, strict=True)
        axes.errorbar(shares, [100 * m for m, _ in means], yerr=[100 * e for _, e in means], **look)


def _finish_accuracy(axes: Axes, curve: Curve) -> None:
    plain = mean_accuracy(curve["plain"]["tasks"])
    if plain is not None:
        axes.axhline(100 * plain[0], color="black", linewidth=1, linestyle=":")
    tasks = [name for name, task in (curve["plain"]["tasks"] or {}).items() if "acc" in task]
    what = tasks[0] if len(tasks) == 1 else f"mean of {len(tasks)} tasks"
    axes.set(ylabel="accuracy, %", title=f"Accuracy on {what} (bars: standard error)")


def plot_orders(orders: Mapping[str, Any], path: Path) -> Path:
    """The sensitivity of every point after grouping over that before; below the line grouping helps."""
    points = orders["points"]
    values = [p[key] for p in points for key in ("before", "after")]
    sizes = sorted(abs(v) for v in values if v)
    linear = 10.0 ** math.floor(math.log10(sizes[len(sizes) // 2])) if sizes else 1.0
    ends = [min(-0.1 * linear, 2 * min(values)), max(linear, 2 * max(values))]
    figure = Figure(figsize=(6.4, 6), layout="constrained", dpi=120)
    axes = figure.subplots()
    for parity, name in enumerate(("attention point", "MLP point")):
        shown = [p for p in points if p["point"] % 2 == parity]
        if shown:
            axes.scatter(
                [p["before"] for p in shown],
                [p["after"] for p in shown],
                color=PALETTE[3 + 3 * parity],
                marker=MARKERS[parity],
                s=28,
                label=name,
                zorder=2,
            )
    axes.plot(ends, ends, color=GREY, linewidth=0.8, linestyle=":", label="unchanged")
    axes.set_xscale("symlog", linthresh=linear, linscale=0.5)
    axes.set_yscale("symlog", linthresh=linear, linscale=0.5)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PLAIN)
    axes.set(
        xlim=ends,
        ylim=ends,
        xlabel="rise in perplexity before grouping",
        ylabel="rise in perplexity after grouping",
        title="Sensitivity of the sync points",
    )
    axes.tick_params(axis="x", labelrotation=45)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
    return write_atomic(path, figure.savefig)
