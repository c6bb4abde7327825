"""The pictures of a run, as PNG files.

Each function draws one picture, writes it atomically and returns its path. Figures are made without pyplot, so that
nothing depends on a display or on state shared between them. Colours can be told apart by colour-blind readers.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from megatron_spd.files import write_atomic
from megatron_spd.report.low_bit_plots import draw_low_bit
from megatron_spd.report.style import GREY, perplexity_scale, plain_log_ticks, smooth
from megatron_spd.report.tables import known_bounds, number, ranges
from megatron_spd.sensitivity.tiers import Thresholds, find_thresholds, low_bit_by_format, tier

TIER_COLOURS = {"ISB": "#4477AA", "SB": "#EE9922", "ESB": "#BB2244"}
TIER_NAMES = {"ISB": "insensitive (ISB)", "SB": "sensitive (SB)", "ESB": "extremely sensitive (ESB)"}


def plot_sensitivity(
    sensitivity: Mapping[str, Any],
    tiers: Thresholds | None,
    path: Path,
    dropped: Collection[int] = (),
) -> Path:
    """What dropping each sync point, or a low-bit all-reduce there, costs, in the model's order and sorted.

    Rows: Algorithm 1 (attention points, cumulative from the last block), each point alone (attention filled, MLP
    hatched), and each point with a low-bit all-reduce, whichever were measured. Colours of the former two are tiers.
    The perplexity axis is linear around zero, logarithmic above.

    Args:
        sensitivity: what the sensitivity sweep writes.
        tiers: tau1 and tau2 for both rows; None: each row's own, by ``find_thresholds``.
        dropped: points to mark below the axis.

    Raises:
        ValueError: nothing was measured.
    """
    algorithm1 = {2 * e["block"]: float(e["sensitivity"]) for e in sensitivity.get("algorithm1") or ()}
    single = {int(e["point"]): float(e["sensitivity"]) for e in sensitivity.get("single") or ()}
    named = (
        ("Algorithm 1: attention points, from the last block on", algorithm1),
        ("Each sync point alone", single),
    )
    series = [(name, scores) for name, scores in named if scores]
    if not series:
        raise ValueError("a sensitivity without 'algorithm1' and 'single' entries; there is nothing to draw")
    low_bit = low_bit_by_format(sensitivity)

    blocks = max(p for _, scores in series for p in scores) // 2 + 1
    width = min(24.0, max(12.0, 0.24 * blocks + 6))
    count = len(series) + bool(low_bit)
    figure = Figure(figsize=(width, 4.4 * count + 0.5), layout="constrained", dpi=120)
    figure.suptitle(
        f"Rise in perplexity when a sync point is dropped{' or low-bit' if low_bit else ''} "
        f"(plain {number(sensitivity.get('plain_perplexity'))}, G = {sensitivity.get('branches', '?')} branches)"
    )
    rows = figure.subplots(count, 2, squeeze=False, width_ratios=(width - 5, 4))
    if low_bit:
        draw_low_bit(rows[-1][0], rows[-1][1], low_bit, blocks)
    for (left, right), (name, scores) in zip(rows, series, strict=False):
        limits = tiers or find_thresholds(scores)
        _draw_points(left, scores, limits, dropped, blocks)
        left.set_title(name, fontsize=11)
        _draw_sorted(right, scores, limits)
        for axes in (left, right):
            perplexity_scale(axes, list(scores.values()))
    figure.legend(
        handles=_point_legend(bool(single), bool(dropped)), loc="outside lower center", ncols=6, fontsize=9
    )
    return write_atomic(path, figure.savefig)


def plot_losses(units: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Distillation: the loss of every unit over its steps, relative to its start, and each unit's gain.

    ``units`` entries have ``blocks`` and ``losses`` (per optimizer step); ``loss_before`` and ``loss_after`` (held-out
    or calibration loss, whatever the distillation recorded) where they were measured.

    Raises:
        ValueError: no unit has losses.
    """
    shown = [u for u in units if u.get("losses")]
    if not shown:
        raise ValueError("no unit with losses; there is nothing to draw")
    figure = Figure(figsize=(11, 4.8), layout="constrained", dpi=120)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    last = max((u["blocks"][-1] for u in units), default=1)
    # The last tenth of the colour map is too bright for a line on white.
    colours = ScalarMappable(Normalize(0, 1.1 * max(1, last)), "viridis")
    for unit in shown:
        curve = smooth([float(v) for v in unit["losses"]])
        start = curve[0] or 1.0
        colour = colours.to_rgba(unit["blocks"][0])
        left.plot(
            range(1, len(curve) + 1), [v / start for v in curve], color=colour, linewidth=1.2, alpha=0.85
        )
    left.set(xlabel="optimizer step", ylabel="loss / loss at the start", title="Block-to-block distillation")
    left.axhline(1.0, color=GREY, linewidth=0.8, linestyle=":")
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.grid(alpha=0.3)
    figure.colorbar(colours, ax=left, label="first block of the unit", ticks=MaxNLocator(integer=True))
    _draw_gains(right, units)
    return write_atomic(path, figure.savefig)


def plot_perplexity(
    perplexity: Mapping[str, float | None],
    path: Path,
    intervals: Mapping[str, Sequence[float | None]] | None = None,
) -> Path:
    """Bars of the plain perplexity and of the SPD model's after every step; what was not measured is left out.

    ``intervals``: [low, high] by the same names, drawn as error bars where both are finite.
    """
    labels = {"plain": "plain", "zero_shot": "zero-shot", "grouped": "grouped", "final": "final"}
    colours = {
        "plain": GREY,
        "zero_shot": TIER_COLOURS["SB"],
        "grouped": "#66CCEE",
        "final": TIER_COLOURS["ISB"],
    }
    shown = [(k, v) for k in labels if (v := perplexity.get(k)) is not None]
    figure = Figure(figsize=(5.6, 4), layout="constrained", dpi=120)
    axes = figure.subplots()
    names, values = [labels[k] for k, _ in shown], [v for _, v in shown]
    axes.bar(names, values, color=[colours[k] for k, _ in shown], width=0.6)
    tops = _error_bars(axes, shown, intervals or {})
    for place, (value, top) in enumerate(zip(values, tops, strict=True)):
        axes.annotate(number(value), (place, top), (0, 3), textcoords="offset points", ha="center")
    plain = perplexity.get("plain")
    if plain:
        axes.axhline(plain, color=GREY, linewidth=0.8, linestyle=":")
    # A bar needs a true zero; only where one bar dwarfs the others is a logarithmic axis the lesser evil.
    if values and max(values) > 8 * min(values):
        axes.set_yscale("log")
        axes.set_ylim(min(values) / 2, max(tops) * 1.6)
        plain_log_ticks(axes.yaxis)
    else:
        axes.set_ylim(0, 1.12 * max(tops, default=1.0))
    axes.set(ylabel="perplexity", title="Perplexity (lower is better)")
    return write_atomic(path, figure.savefig)


def _error_bars(
    axes: Axes, bars: Sequence[tuple[str, float]], intervals: Mapping[str, Sequence[float | None]]
) -> list[float]:
    """Draw the intervals there are; the upper end of every bar with its interval."""
    tops = []
    for place, (name, value) in enumerate(bars):
        low, high = known_bounds(intervals.get(name)) or (value, value)
        if low < high:
            axes.vlines(place, low, high, color="black", linewidth=1)
        tops.append(high)
    return tops


# ---- parts of the sensitivity figure --------------------------------------------------------------------------------


def _draw_points(
    axes: Axes, scores: Mapping[int, float], limits: Thresholds, dropped: Collection[int], blocks: int
) -> None:
    """A bar per point, the MLP's half a block to the right of the attention's; a mark below each dropped one."""
    for parity, hatch in ((0, ""), (1, "/////")):
        points = [p for p in sorted(scores) if p % 2 == parity]
        colours = [TIER_COLOURS[tier(scores[p], limits)] for p in points]
        axes.bar(
            [p / 2 for p in points],
            [scores[p] for p in points],
            width=0.42,
            color="white" if hatch else colours,
            edgecolor=colours,
            hatch=hatch,
            linewidth=0.8,
        )
    axes.axhline(0, color="black", linewidth=0.8)
    marked = [p for p in dropped if p in scores]
    if marked:
        below = axes.get_xaxis_transform()
        heights = [-0.03] * len(marked)
        axes.plot(
            [p / 2 for p in marked], heights, "^", color="black", markersize=4, transform=below, clip_on=False
        )
    axes.set_xlim(-0.6, blocks)
    axes.set_xticks(range(0, blocks, 1 if blocks <= 40 else 2))
    axes.tick_params(axis="x", length=0, pad=11 if marked else 4, labelsize=8)
    axes.set(xlabel="block", ylabel="rise in perplexity")
    axes.grid(axis="y", alpha=0.3)


def _point_legend(hatched: bool, marked: bool) -> list[Patch | Line2D]:
    handles: list[Patch | Line2D] = [Patch(color=TIER_COLOURS[t], label=TIER_NAMES[t]) for t in TIER_COLOURS]
    if hatched:
        handles.append(Patch(facecolor=GREY, edgecolor=GREY, label="attention point"))
        handles.append(Patch(facecolor="white", edgecolor=GREY, hatch="/////", label="MLP point"))
    if marked:
        handles.append(Line2D([], [], marker="^", color="black", linestyle="", markersize=5, label="dropped"))
    return handles


def _draw_sorted(axes: Axes, scores: Mapping[int, float], limits: Thresholds) -> None:
    """The scores in ascending order, and the two thresholds between which the tiers lie."""
    values = sorted(scores.values())
    places = range(1, len(values) + 1)
    axes.plot(places, values, color=GREY, linewidth=1, zorder=1)
    axes.scatter(places, values, c=[TIER_COLOURS[tier(v, limits)] for v in values], s=18, zorder=2)
    for name, value, colour in (
        ("tau1", limits.tau1, TIER_COLOURS["SB"]),
        ("tau2", limits.tau2, TIER_COLOURS["ESB"]),
    ):
        axes.axhline(value, color=colour, linewidth=1.2, linestyle=":", label=f"{name} = {number(value)}")
    axes.legend(fontsize=9, loc="upper left")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_title("sorted", fontsize=11)
    axes.set(xlabel="points, least sensitive first")
    axes.grid(alpha=0.3)


# ---- parts of the loss figure ---------------------------------------------------------------------------------------


def _draw_gains(axes: Axes, units: Sequence[Mapping[str, Any]]) -> None:
    """For each unit a line from its loss before to its loss after."""
    measured = [u for u in units if u.get("loss_before") and u.get("loss_after")]
    for row, unit in enumerate(measured):
        before, after = float(unit["loss_before"]), float(unit["loss_after"])
        axes.plot([before, after], [row, row], color=GREY, linewidth=1.2, zorder=1)
        axes.scatter([before], [row], color=TIER_COLOURS["SB"], s=22, zorder=2)
        axes.scatter([after], [row], color=TIER_COLOURS["ISB"], s=22, zorder=2)
    step = max(1, math.ceil(len(measured) / 20))
    axes.set_yticks(
        range(0, len(measured), step), [ranges(u["blocks"]) for u in measured[::step]], fontsize=8
    )
    axes.invert_yaxis()
    if measured:
        axes.set_xscale("log")
        plain_log_ticks(axes.xaxis)
        axes.tick_params(axis="x", labelsize=8, rotation=45)
    axes.set(xlabel="block-output loss", ylabel="blocks of the unit", title="Before and after")
    axes.grid(alpha=0.3)
    handles = [
        Line2D([], [], marker="o", linestyle="", color=TIER_COLOURS["SB"], label="before"),
        Line2D([], [], marker="o", linestyle="", color=TIER_COLOURS["ISB"], label="after"),
    ]
    axes.legend(handles=handles, fontsize=9, loc="upper right")
