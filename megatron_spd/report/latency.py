"""Latency of plain and SPD models: the report of ``megatron-spd bench``.

A *benchmark* dict, as it stands in ``bench.json``: ``model``, ``ranks`` (M), ``ranks_per_node`` (behind one link; None
where links are as they are), ``backend``, ``device``, ``cores`` and
``threads`` of a rank, ``dtype``, ``rounds``; ``variants`` by name: ``branches`` (G), ``sync_points``, ``silent``;
``links``, one for every speed: ``gigabits`` (as set, None where it was not), ``seconds_per_call`` and
``bytes_per_second`` as all-reduces showed them (None between no ranks), ``nominal`` (bytes per second), ``inside`` (the
same of the ranks of one branch, by G, for each 1 < G < M), and ``cases``:
``batch``, ``prompt``, ``new_tokens``, and ``variants`` by name with the phases ``first_token`` and ``next_token``.

A phase holds ``seconds`` {median, low, high: quartiles}; ``calls``, ``num_bytes``, ``sent`` of one forward pass (see
``latency/measure.py``) among all ranks, and with ``inside_`` in front inside branch groups; ``saving`` over plain
{measured, change: with quartiles; predicted, bound, of_predicted}; and ``breakdown`` in seconds (``total``,
``outside``, ``blocks``, each with compute, communication, wait).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_spd.files import write_text_atomic
from megatron_spd.report.document import Section, Table, pictures_of, write_document
from megatron_spd.report.tables import MISSING, number, size, text_table

Benchmark = Mapping[str, Any]

#: The phases of a case, and what their figures are called.
PHASES = {"first_token": "time to first token", "next_token": "time between tokens"}

HEADER = (
    "",
    "calls",
    "bytes",
    "ms",
    "quartiles",
    "change",
    "saved, ms",
    "predicted",
    "of predicted",
    "bytes / rate",
)
BREAKDOWN_HEADER = ("", "compute", "communication", "wait", "communication and wait")

_NOTES = [
    "Calls and bytes: collectives of the blocks in one forward pass of a rank, and what it gives in; the embedding's "
    "all-reduce and the output layer's gather come on top. Times are the slowest rank's, medians and quartiles of all "
    "rounds; a saving compares with the plain run of the same round. Where a branch spans several ranks (M > G), what "
    "is summed inside it stands behind a plus.",
    "Predicted: calls times what an all-reduce of one number takes, and bytes at the rate of a large all-reduce, "
    "both measured on the same link with nothing else running. Bytes / rate: the bytes that need not be sent, at the "
    "link's rate. No communication: plain, with collectives left out and results discarded, is the limit.",
    "Communication: the least time that any rank spends in a collective; wait: what the others spend beyond it.",
]


def write_latency_report(benchmark: Benchmark, folder: Path) -> dict[str, str]:
    """Write ``bench.json``, ``bench.html``, ``bench.md``, ``bench.png`` and ``breakdown.png`` into ``folder``, each
    whole or not at all; their paths."""
    # matplotlib takes seconds to import, which ranks that only measure are spared.
    from megatron_spd.report.latency_plots import plot_breakdown, plot_latency

    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "bench.json"
    write_text_atomic(data, json.dumps(benchmark, indent=1, allow_nan=False) + "\n")
    pictures = {
        "bench": plot_latency(benchmark, PHASES, folder / "bench.png"),
        "breakdown": plot_breakdown(benchmark, PHASES, folder / "breakdown.png"),
    }
    written = write_document(
        f"Latency: {benchmark['model']}", _sections(benchmark, pictures), folder, "bench"
    )
    return {name: str(path) for name, path in ({"json": data} | pictures | written).items()}


def latency_text(benchmark: Benchmark, paths: Mapping[str, str]) -> str:
    """What ``megatron-spd bench`` prints at its end."""
    lines = [_head(benchmark)]
    for link in benchmark["links"]:
        for case in link["cases"]:
            for phase, title in PHASES.items():
                lines += [
                    "",
                    f"{title}: {_case_in_words(link, case)}",
                    text_table(HEADER, phase_rows(case, phase)),
                ]
    if paths:
        width = max(map(len, paths))
        lines += ["", *(f"{name.ljust(width)}  {path}" for name, path in paths.items())]
    return "\n".join(lines)


def phase_rows(case: Mapping[str, Any], phase: str) -> list[tuple[str, ...]]:
    """A row of :data:`HEADER` for every variant; the first is what the others are compared with."""
    rows: list[tuple[str, ...]] = []
    for name, measured in case["variants"].items():
        one = measured[phase]
        seconds, saving = one["seconds"], one["saving"]
        row = [name, *_traffic(one), _ms(seconds["median"])]
        row.append(f"{_ms(seconds['low'])} to {_ms(seconds['high'])}")
        if rows:
            share = saving["of_predicted"]
            row += [f"{100 * saving['change']['median']:+.1f} %", _ms(saving["measured"]["median"])]
            row += [_ms(saving["predicted"]), MISSING if share is None else f"{100 * share:.0f} %"]
            row.append(_ms(saving["bound"]))
        rows.append((*row, *[""] * (len(HEADER) - len(row))))
    return rows


def _traffic(phase: Mapping[str, Any]) -> list[str]:
    """Calls and bytes: among all ranks, and after a plus inside branch groups."""
    cells = [number(phase["calls"]), size(phase["num_bytes"])]
    if not phase["inside_calls"]:
        return cells
    inside = number(phase["inside_calls"]), size(phase["inside_bytes"])
    return [f"{all_ranks} + {branch}" for all_ranks, branch in zip(cells, inside, strict=True)]


def breakdown_rows(case: Mapping[str, Any], phase: str) -> list[tuple[str, ...]]:
    """A row of :data:`BREAKDOWN_HEADER`, in ms, for every variant."""
    rows = []
    for name, measured in case["variants"].items():
        total = measured[phase]["breakdown"]["total"]
        between = total["communication"] + total["wait"]
        share = between / (between + total["compute"])
        parts = (_ms(total[part]) for part in ("compute", "communication", "wait"))
        rows.append((name, *parts, f"{100 * share:.0f} %"))
    return rows


def link_in_words(link: Mapping[str, Any]) -> str:
    """The link's speed: as set, or else as measured."""
    if link["gigabits"] is not None:
        return f"{link['gigabits']:g} Gbit/s"
    return "one rank" if link["bytes_per_second"] is None else "link as it is"


def _ms(seconds: float) -> str:
    return number(1000 * seconds)


def _case_in_words(link: Mapping[str, Any], case: Mapping[str, Any]) -> str:
    return f"{link_in_words(link)}, batch {case['batch']}, prompt {case['prompt']}, {case['new_tokens']} new tokens"


def _head(benchmark: Benchmark) -> str:
    together = benchmark["ranks_per_node"] or 1
    nodes = f" on {benchmark['ranks'] // together} nodes" if together > 1 else ""
    return (
        f"{benchmark['model']}: M = {benchmark['ranks']} ranks{nodes} over {benchmark['backend']} on "
        f"{benchmark['device']} ({benchmark['cores']} cores, {benchmark['threads']} threads a rank), "
        f"{benchmark['dtype']}, {benchmark['rounds']} rounds"
    )


def _link_shown(link: Mapping[str, Any]) -> str:
    if link["bytes_per_second"] is None:
        return "One rank: nothing is communicated."
    shown = [("An all-reduce", link)]
    shown += [
        (f"Inside a branch of G = {branches} one", inside) for branches, inside in link["inside"].items()
    ]
    return " ".join(
        f"{what} of one number takes {_ms(speed['seconds_per_call'])} ms, a large one sends "
        f"{number(8 * speed['bytes_per_second'] / 1e9)} Gbit/s."
        for what, speed in shown
    )


def _sections(benchmark: Benchmark, pictures: Mapping[str, Path]) -> list[Section]:
    captions = {
        "bench": "Times with quartiles; black lines: predicted from calls and bytes",
        "breakdown": "Compute, communication and wait of one forward pass",
    }
    sections = [
        Section("What was measured", [_head(benchmark), *_NOTES], pictures=pictures_of(pictures, **captions))
    ]
    for link in benchmark["links"]:
        for case in link["cases"]:
            tables = []
            for phase, title in PHASES.items():
                tables.append(Table((title, *HEADER[1:]), phase_rows(case, phase)))
                parts = (f"{title}, parts in ms", *BREAKDOWN_HEADER[1:])
                tables.append(Table(parts, breakdown_rows(case, phase)))
            sections.append(Section(_case_in_words(link, case), [_link_shown(link)], tables))
    return sections


def messages_text(result: Mapping[str, Any]) -> str:
    """What ``megatron-spd collectives`` prints; ``result``: of ``latency.messages.measure_messages``."""
    cells = [
        (
            MISSING if row["gigabits"] is None else f"{row['gigabits']:g} Gbit/s",
            size(row["bytes"]),
            row["collective"],
            f"{1e3 * row['seconds']:.3f} ms",
            MISSING if row["least_seconds"] is None else f"{1e3 * row['least_seconds']:.3f} ms",
            size(row["sent"]),
            f"{row['ratio']:.2f} ({row['ratio_low']:.2f} to {row['ratio_high']:.2f})",
            f"{row['error']:.1e}",
        )
        for row in result["rows"]
    ]
    header = (
        "link",
        "message",
        "collective",
        "median",
        "bytes / rate",
        "sent by a rank",
        "full over this",
        "error",
    )
    head = f"{result['ranks']} ranks, {result['backend']}, {result['dtype']}, {result['repeats']} repeats"
    return f"{head}\n{text_table(header, cells)}"
