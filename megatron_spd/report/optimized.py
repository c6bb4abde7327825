"""An optimised plan: what it costs beside the plain model, and the choices that were measured on the way.

An *optimized* record has ``objective`` (bytes: for each token; latency: seconds of a prompt's collectives), ``limit``
(per cent), ``cost`` {before, after}, ``points`` {none, formats, full: how many}, ``predicted_increase`` (per cent), and
``measured``, None where nothing was: ``plain`` (perplexity), ``sync_points``, ``cost``, ``predicted``, ``equivalent``
(the perplexity that the divergence stands for), ``perplexity``, ``increase`` (per cent, of the greater of the two), and
``history`` of all choices in order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from megatron_spd.collective import NONE
from megatron_spd.report.document import Section, Table
from megatron_spd.report.tables import change, number, percent, size

_OBJECTIVES = {"bytes": "bytes per token", "latency": "predicted time of a prompt's collectives"}


def optimized_text(record: Mapping[str, Any]) -> str:
    """Cost, points, and increase of perplexity, in one line each."""
    before, after = record["cost"]["before"], record["cost"]["after"]
    counts = [f"{n} {'dropped' if what == NONE else what}" for what, n in record["points"].items()]
    increase = f"predicted {percent(record['predicted_increase'])}"
    if measured := record["measured"]:
        increase += (
            f", measured {percent(measured['increase'])} ({number(measured['plain'])} to "
            f"{number(measured['perplexity'])}; by divergence {number(measured['equivalent'])}; "
            f"{len(measured['history'])} sets measured)"
        )
    return "\n".join(
        [
            f"{_OBJECTIVES[record['objective']]}: {_cost(record, before)} before, {_cost(record, after)} after "
            f"({change(before, after)})",
            f"sync points: {', '.join(counts)}",
            f"perplexity, allowed {percent(record['limit'])}: {increase}",
        ]
    )


def optimized_section(record: Mapping[str, Any]) -> Section:
    """The same for the report, with all measured choices."""
    measured = record["measured"]
    names = list(record["points"])
    header = ("set", *("dropped" if n == NONE else n for n in names), "cost", "predicted", "by divergence")
    rows = []
    for i, entry in enumerate(measured["history"] if measured else (), start=1):
        counts = Counter(entry["sync_points"])
        figures = [number(entry[key]) for key in ("predicted", "equivalent", "perplexity")]
        rows.append((str(i), *(str(counts[n]) for n in names), _cost(record, entry["cost"]), *figures))
    tables = [Table((*header, "perplexity"), rows)] if rows else []
    return Section("Choice among drop, low-bit and full", optimized_text(record).split("\n"), tables)


def _cost(record: Mapping[str, Any], cost: float) -> str:
    return size(cost) if record["objective"] == "bytes" else f"{number(1e3 * cost)} ms"
