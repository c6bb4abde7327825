"""What calibration did to each block: the errors of all candidates, and what the guard kept (method section 7).

A *record* is one block's: ``block``; ``errors`` {"attention" | "mlp" | "heads": {candidate: error}}, the energy of the
error behind the sublayer on held-out sequences relative to that of the dense sublayer's output; ``kept``, the chosen
candidate by the same keys.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from megatron_spd.files import write_atomic
from megatron_spd.report.document import Section, Table, pictures_of
from megatron_spd.report.style import GREY, MARKERS, PALETTE, plain_log_ticks
from megatron_spd.report.tables import change, number

Record = Mapping[str, Any]

GUARD_HEADER = ("block", "sublayer", "error before", "error after", "change", "kept")
HEADS_HEADER = ("block", "heads in place", "published", "joint", "kept")

_SUBLAYERS = {"attention": "attention", "mlp": "MLP"}
#: The candidate that changes nothing.
_UNTOUCHED = "none"


def calibration_section(records: Sequence[Record], pictures: Mapping[str, Path]) -> Section:
    """The guard's verdict on every calibrated block, and the two ways of choosing heads side by side."""
    tables = [Table(GUARD_HEADER, rows)] if (rows := guard_rows(records)) else []
    words = [
        "Error: energy of the hidden state's error behind the sublayer on held-out pieces, relative to the dense "
        "sublayer's output, with the sublayer's heads as kept."
    ]
    if rows:
        counts = Counter(row[-1] for row in rows)
        words.append(
            "Kept: " + ", ".join(f"{name} in {n}" for name, n in counts.most_common()) + " sublayers."
        )
    if heads := head_rows(records):
        tables.append(Table(HEADS_HEADER, heads))
        words.append(_heads_in_words(records))
    return Section(
        "Grouping and compensation: what helps which block",
        words,
        tables,
        pictures_of(pictures, guard="Error of every sublayer before and after, and what the guard kept"),
    )


def guard_rows(records: Sequence[Record]) -> list[tuple[str, ...]]:
    """(block, sublayer, error before, after, change, kept) of every sublayer that had a choice."""
    return [
        (str(block), _SUBLAYERS[sublayer], number(before), number(after), change(before, after), kept)
        for block, sublayer, before, after, kept in _choices(records)
    ]


def head_rows(records: Sequence[Record]) -> list[tuple[str, ...]]:
    """(block, error with the heads in place, with the published order, with the joint one, kept) of every block that
    tried orders of heads. Neurons and inputs are calibrated anew for each."""
    rows = []
    for record in records:
        errors = record["errors"].get("heads")
        if errors:
            found = [number(errors.get(name)) for name in ("original", "published", "joint")]
            kept = record["kept"]["heads"]
            rows.append((str(record["block"]), *found, "in place" if kept == "original" else kept))
    return rows


def _heads_in_words(records: Sequence[Record]) -> str:
    """The joint choice against the published one, where both were measured."""
    tried = [r["errors"].get("heads") or {} for r in records]
    both = [e for e in tried if {"published", "joint"} <= e.keys() and min(e.values()) > 0]
    if not both:
        return "No block tried both the published and the joint order of heads: they agree, or one was not asked for."
    logs = [math.log(e["joint"] / e["published"]) for e in both]
    mean = 100 * (math.exp(sum(logs) / len(logs)) - 1)
    better = sum(v < 0 for v in logs)
    return (
        f"Heads chosen jointly with neurons have a lower error than the published order in {better} of {len(both)} "
        f"blocks; geometric mean {mean:+.1f} %."
    )


def _choices(records: Sequence[Record]) -> list[tuple[int, str, float, float, str]]:
    """(block, sublayer, error before, after, kept in words)."""
    found = []
    for record in records:
        for sublayer in _SUBLAYERS:
            errors = record["errors"].get(sublayer)
            if errors:
                kept = record["kept"][sublayer]
                found.append(
                    (record["block"], sublayer, errors[_UNTOUCHED], errors[kept], kept_in_words(kept))
                )
    return found


def kept_in_words(candidate: str) -> str:
    """A candidate's name without what does nothing."""
    return " + ".join(part for part in candidate.split(" + ") if part != _UNTOUCHED) or "nothing"


def has_choices(records: Sequence[Record]) -> bool:
    """Whether there is something to draw."""
    return any(min(before, after) > 0 for _, _, before, after, _ in _choices(records))


def plot_guard(records: Sequence[Record], path: Path) -> Path:
    """For every sublayer with a choice a line from its error before (hollow) to the one after, in the colour and with
    the marker of what was kept. Attention stands on the block's number, MLP half a block to the right.

    Raises:
        ValueError: no sublayer has errors above zero.
    """
    shown = [c for c in _choices(records) if min(c[2], c[3]) > 0]
    if not shown:
        raise ValueError("no sublayer with errors; there is nothing to draw")
    names = [name for name, _ in Counter(c[-1] for c in shown).most_common()]
    looks = {name: (PALETTE[-1 - i % 6], MARKERS[1 + i % 6]) for i, name in enumerate(names)}
    looks |= {kept_in_words(_UNTOUCHED): (GREY, "o")} if kept_in_words(_UNTOUCHED) in looks else {}
    blocks = max(c[0] for c in shown) + 1
    figure = Figure(figsize=(min(22.0, max(8.0, 0.3 * blocks + 4)), 4.6), layout="constrained", dpi=120)
    axes = figure.subplots()
    for block, sublayer, before, after, kept in shown:
        x = block + (0.5 if sublayer == "mlp" else 0.0)
        colour, marker = looks[kept]
        axes.plot([x, x], [before, after], color=colour, linewidth=1.2, zorder=1)
        axes.scatter([x], [before], facecolor="white", edgecolor=GREY, s=26, zorder=2)
        axes.scatter([x], [after], color=colour, marker=marker, s=34, zorder=3)
    axes.set_yscale("log")
    plain_log_ticks(axes.yaxis)
    axes.set_xlim(-0.7, blocks + 0.2)
    axes.xaxis.set_major_locator(MaxNLocator(min(blocks + 1, 40), integer=True))
    axes.set(
        xlabel="block (attention on the number, MLP half-way to the next)",
        ylabel="relative error on held-out text",
        title="Grouping and compensation: before and after",
    )
    axes.grid(alpha=0.3)
    handles = [
        Line2D(
            [], [], marker="o", linestyle="", markerfacecolor="white", markeredgecolor=GREY, label="before"
        )
    ]
    for name, (colour, marker) in looks.items():
        handles.append(Line2D([], [], marker=marker, linestyle="", color=colour, label=f"kept: {name}"))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)), fontsize=9)
    return write_atomic(path, figure.savefig)
