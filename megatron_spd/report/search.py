"""What the schedule search measured: every set with its predicted and its measured damage.

A *search* has ``points`` and ``perplexity`` of the set that it found, and ``history``: ``points``, ``perplexity``,
``predicted`` and ``origin`` (start, exchange, optimum or extension) of all sets that it looked at, in order.
A perplexity here is that of ``sensitivity/measure.py``: on the text that sets were measured on, what the divergence
from the plain model's predictions stands for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from megatron_spd.files import write_atomic
from megatron_spd.report.document import Section, Table, pictures_of
from megatron_spd.report.style import GREY, plain_log_ticks
from megatron_spd.report.tables import change, number

Entry = Mapping[str, Any]

SEARCH_HEADER = ("set", "origin", "dropped", "predicted", "measured", "off by", "best of its size")

_LOOKS = {
    "start": ("#4477AA", "o"),
    "exchange": ("#228833", "^"),
    "optimum": ("#EE6677", "D"),
    "extension": ("#AA3377", "s"),
}


def search_section(search: Mapping[str, Any], pictures: Mapping[str, Path]) -> Section:
    """What was measured, and what came of it."""
    history = search["history"]
    words = (
        f"{len(history)} sets were measured; the one chosen has {len(search['points'])} points. Perplexities here "
        "stand for the divergence from the plain model's predictions, plain x exp(KL), on the text that sets are "
        "chosen on."
    )
    same = [e for e in history if len(e["points"]) == len(search["points"])]
    # The first is what the scores alone would have chosen.
    if same and math.isfinite(same[0]["perplexity"]):
        words += (
            f" The first of that size, which the single points alone suggest, has perplexity "
            f"{number(same[0]['perplexity'])}, the chosen one {number(search['perplexity'])} "
            f"({change(same[0]['perplexity'], search['perplexity'])})."
        )
    return Section(
        "Search for the set of sync points",
        [words],
        [Table(SEARCH_HEADER, search_rows(history))],
        pictures_of(
            pictures, search="Sets in the order of their measurement, and predicted against measured"
        ),
    )


def search_rows(history: Sequence[Entry]) -> list[tuple[str, ...]]:
    """(number, origin, points dropped, predicted and measured perplexity, difference, best of its size so far)."""
    rows: list[tuple[str, ...]] = []
    for i, (entry, best) in enumerate(zip(history, _best_so_far(history), strict=True), start=1):
        predicted, measured = entry["predicted"], entry["perplexity"]
        rows.append(
            (
                str(i),
                entry["origin"],
                str(len(entry["points"])),
                number(predicted),
                number(measured),
                change(predicted, measured),
                number(best),
            )
        )
    return rows


def _best_so_far(history: Sequence[Entry]) -> list[float]:
    """For every set the least perplexity among sets of as many points, up to it."""
    best: dict[int, float] = {}
    found = []
    for entry in history:
        size = len(entry["points"])
        best[size] = min(best.get(size, math.inf), entry["perplexity"])
        found.append(best[size])
    return found


def has_measurements(search: Mapping[str, Any]) -> bool:
    """Whether there is something to draw."""
    return bool(_finite(search["history"]))


def plot_search(search: Mapping[str, Any], path: Path) -> Path:
    """Left: the measured sets in order with the best so far of the chosen size. Right: predicted against measured.

    Raises:
        ValueError: no set has a finite perplexity.
    """
    shown = _finite(search["history"])
    if not shown:
        raise ValueError("a search without measured sets; there is nothing to draw")
    figure = Figure(figsize=(11, 4.6), layout="constrained", dpi=120)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for number_, entry in shown:
        colour, marker = _LOOKS[entry["origin"]]
        left.scatter([number_], [entry["perplexity"]], color=colour, marker=marker, s=30, zorder=2)
        right.scatter(
            [entry["predicted"]], [entry["perplexity"]], color=colour, marker=marker, s=30, zorder=2
        )
    size = len(search["points"])
    same = [(i, e) for i, e in shown if len(e["points"]) == size]
    if same:
        best = _best_so_far([e for _, e in same])
        left.step([i for i, _ in same], best, where="post", color=GREY, linewidth=1.2, zorder=1)
    left.set(
        xlabel="set, in the order of measurement",
        ylabel="perplexity, measured",
        title=f"Sets measured; line: best of {size} points",
    )
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.set_yscale("log")
    plain_log_ticks(left.yaxis)
    left.grid(alpha=0.3)
    _diagonal(right, [e for _, e in shown])
    used = {e["origin"] for _, e in shown}
    handles = [
        Line2D([], [], marker=marker, linestyle="", color=colour, label=name)
        for name, (colour, marker) in _LOOKS.items()
        if name in used
    ]
    left.legend(handles=handles, fontsize=9, title="set came from", title_fontsize=9)
    return write_atomic(path, figure.savefig)


def _diagonal(axes: Axes, entries: Sequence[Entry]) -> None:
    """Equal logarithmic axes with the line on which a prediction is right."""
    values = [v for e in entries for v in (e["predicted"], e["perplexity"])]
    low, high = min(values) / 1.02, max(values) * 1.02
    axes.plot([low, high], [low, high], color=GREY, linewidth=0.8, linestyle=":")
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
    plain_log_ticks(axes.xaxis)
    plain_log_ticks(axes.yaxis)
    axes.tick_params(axis="x", labelrotation=45)
    axes.set(
        xlabel="perplexity, predicted", ylabel="perplexity, measured", title="Prediction before measurement"
    )
    axes.grid(alpha=0.3)


def _finite(history: Sequence[Entry]) -> list[tuple[int, Entry]]:
    """The sets with finite perplexities, numbered from 1 as in the table."""
    return [
        (i, e)
        for i, e in enumerate(history, start=1)
        if all(math.isfinite(e[key]) for key in ("perplexity", "predicted"))
    ]
