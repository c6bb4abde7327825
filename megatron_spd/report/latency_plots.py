"""The pictures of a latency benchmark (``report/latency.py`` says what it holds)."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_spd.files import write_atomic
from megatron_spd.report.style import GREY, PALETTE

Benchmark = Mapping[str, Any]

#: Parts of a forward pass by their names in a breakdown.
PARTS = {"compute": "#4477AA", "communication": "#EE6677", "wait": "#CCBB44"}


def plot_latency(benchmark: Benchmark, phases: Mapping[str, str], path: Path) -> Path:
    """Bars with quartiles: a row for every batch and prompt, a column for every phase, a group for every link. A black
    line on a bar: plain less the saving predicted from calls and bytes. Above: the change over plain in percent."""
    links = benchmark["links"]
    names = list(benchmark["variants"])
    count = len(links[0]["cases"])
    width = max(5.5, 0.32 * len(links) * len(names) + 1.5)
    figure = Figure(figsize=(2 * width, 3.6 * count + 0.9), layout="constrained", dpi=120)
    rows = figure.subplots(count, len(phases), squeeze=False)
    for index, row in enumerate(rows):
        for axes, (phase, title) in zip(row, phases.items(), strict=True):
            case = links[0]["cases"][index]
            axes.set_title(f"{title}, batch {case['batch']}, prompt {case['prompt']}", fontsize=10)
            _draw_bars(axes, [link["cases"][index]["variants"] for link in links], names, phase)
            axes.set_xticks(range(len(links)), [_link_name(link) for link in links])
            axes.set_ylabel("ms")
            axes.grid(axis="y", alpha=0.3)
            axes.set_axisbelow(True)
    handles, labels = rows[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(names)), fontsize=9)
    return write_atomic(path, figure.savefig)


def plot_breakdown(benchmark: Benchmark, phases: Mapping[str, str], path: Path) -> Path:
    """Where the time goes in the first batch and prompt: a row for every link; stacked bars of each phase, and the
    communication and wait until the first token, added up over the blocks."""
    links, names = benchmark["links"], list(benchmark["variants"])
    height = max(2.2, 0.4 * len(names) + 1.1)
    figure = Figure(figsize=(16, height * len(links) + 0.8), layout="constrained", dpi=120)
    rows = figure.subplots(len(links), len(phases) + 1, squeeze=False)
    for row, link in zip(rows, links, strict=True):
        case = link["cases"][0]
        for axes, (phase, title) in zip(row, phases.items(), strict=False):
            _draw_parts(axes, case["variants"], names, phase)
            axes.set_title(f"{title}: {_link_name(link)}", fontsize=10)
        _draw_blocks(row[-1], case["variants"], names)
        row[-1].set_title(f"first token, waits added up: {_link_name(link)}", fontsize=10)
    handles, labels = rows[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=len(PARTS), fontsize=9)
    handles, labels = rows[0][-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower right", ncols=min(4, len(names)), fontsize=9)
    return write_atomic(path, figure.savefig)


def _colour(names: list[str], name: str) -> str:
    """The limit, which comes last, is grey."""
    place = names.index(name)
    return PALETTE[0] if place == len(names) - 1 else PALETTE[1 + place % (len(PALETTE) - 1)]


def _again(names: list[str], name: str) -> bool:
    """Whether another variant has the colour already: this one is hatched, or dashed."""
    return names.index(name) >= len(PALETTE) - 1 and name != names[-1]


def _link_name(link: Mapping[str, Any]) -> str:
    return "link as it is" if link["gigabits"] is None else f"{link['gigabits']:g} Gbit/s"


def _draw_bars(axes: Axes, by_link: list[Mapping[str, Any]], names: list[str], phase: str) -> None:
    width, crowded = 0.84 / len(names), len(names) > 5
    top = 0.0
    for place, name in enumerate(names):
        label: str | None = name
        for group, variants in enumerate(by_link):
            one, plain = variants[name][phase], variants[names[0]][phase]
            seconds = {k: 1000 * v for k, v in one["seconds"].items()}
            x = group + (place - (len(names) - 1) / 2) * width
            (bar,) = axes.bar(x, seconds["median"], 0.92 * width, color=_colour(names, name), label=label)
            bar.set(edgecolor="white", linewidth=0, hatch="//" if _again(names, name) else None)
            axes.vlines(x, seconds["low"], seconds["high"], color=GREY, linewidth=1.2)
            top, label = max(top, seconds["high"]), None
            if place:
                expected = 1000 * (plain["seconds"]["median"] - one["saving"]["predicted"])
                axes.hlines(expected, x - 0.46 * width, x + 0.46 * width, color="black", linewidth=1.6)
                change = f"{100 * one['saving']['change']['median']:+.0f} %"
                height = max(seconds["high"], expected)
                turned = 90 if crowded else 0
                axes.annotate(
                    change,
                    (x, height),
                    (0, 3),
                    textcoords="offset points",
                    ha="center",
                    fontsize=7,
                    rotation=turned,
                )
    axes.set_ylim(0, (1.2 if crowded else 1.1) * top)


def _draw_parts(axes: Axes, variants: Mapping[str, Any], names: list[str], phase: str) -> None:
    left = [0.0] * len(names)
    for part, colour in PARTS.items():
        values = [1000 * variants[name][phase]["breakdown"]["total"][part] for name in names]
        axes.barh(range(len(names)), values, left=left, color=colour, label=part, height=0.7)
        left = [a + b for a, b in zip(left, values, strict=True)]
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("ms")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)


def _draw_blocks(axes: Axes, variants: Mapping[str, Any], names: list[str]) -> None:
    for name in names:
        blocks = variants[name]["first_token"]["breakdown"]["blocks"]
        values = [1000 * (c + w) for c, w in zip(blocks["communication"], blocks["wait"], strict=True)]
        style = "--" if _again(names, name) else "-"
        steps = list(accumulate(values))
        axes.plot(range(len(steps)), steps, style, color=_colour(names, name), label=name, linewidth=1.4)
    axes.set(xlabel="up to block", ylabel="ms")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
