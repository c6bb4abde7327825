"""The part of the sensitivity picture that shows low-bit all-reduces."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from megatron_spd.report.style import GREY, MARKERS, PALETTE, PLAIN, perplexity_scale

#: The first of the palette is too light for a thin marker.
_COLOURS = PALETTE[1:]


def draw_low_bit(left: Axes, right: Axes, scores: Mapping[str, Mapping[int, float]], blocks: int) -> None:
    """``scores``: rise in perplexity by format and sync point. ``left``: by point in the model's order, attention
    points filled, MLP points hollow; ``right``: each format's scores in ascending order."""
    handles = []
    for i, (name, by_point) in enumerate(scores.items()):
        colour, marker = _COLOURS[i % len(_COLOURS)], MARKERS[i % len(MARKERS)]
        for parity, face in ((0, colour), (1, "white")):
            points = [p for p in sorted(by_point) if p % 2 == parity]
            heights = [by_point[p] for p in points]
            left.scatter(
                [p / 2 for p in points], heights, s=26, marker=marker, facecolors=face, edgecolors=colour
            )
        values = sorted(by_point.values())
        right.plot(range(1, len(values) + 1), values, color=colour, marker=marker, markersize=4, linewidth=1)
        handles.append(Line2D([], [], color=colour, marker=marker, linestyle="", label=name))
    handles += [
        Line2D([], [], color=GREY, marker="o", linestyle="", label="attention point"),
        Line2D([], [], color=GREY, marker="o", linestyle="", markerfacecolor="white", label="MLP point"),
    ]
    left.legend(handles=handles, fontsize=9, loc="upper right", ncols=len(handles))
    left.set_title("Each sync point alone with a low-bit all-reduce", fontsize=11)
    left.set(xlabel="block", ylabel="rise in perplexity", xlim=(-0.6, blocks))
    left.set_xticks(range(0, blocks, 1 if blocks <= 40 else 2))
    left.tick_params(axis="x", labelsize=8)
    right.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    right.set_title("sorted", fontsize=11)
    right.set(xlabel="points, least sensitive first")
    every = [score for by_point in scores.values() for score in by_point.values()]
    for axes in (left, right):
        axes.grid(alpha=0.3)
        if min(every) > 0:
            # Formats may lie orders of magnitude apart.
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(PLAIN)
            axes.set_ylim(min(every) / 2, max(every) * 5)
        else:
            axes.axhline(0, color="black", linewidth=0.8)
            perplexity_scale(axes, every)
