"""The numbers of a run as tables: aligned text for the terminal, Markdown for the report.

A *results* dict has the keys that :mod:`megatron_spd.report.run` lists; what was not measured is None or missing and
shows as "-". A *sensitivity* dict is what ``megatron_spd.sensitivity.sweep`` writes as JSON.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megatron_spd.sensitivity.tiers import low_bit_by_format

MISSING = "-"


def text_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns aligned with spaces, first column to the left, the others to the right; a rule under the header."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[c]) for line in lines) for c in range(len(header))]

    def render(line: Sequence[str]) -> str:
        cells = [
            cell.ljust(w) if c == 0 else cell.rjust(w)
            for c, (cell, w) in enumerate(zip(line, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    return "\n".join([render(lines[0]), "  ".join("-" * w for w in widths), *map(render, lines[1:])])


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, first column to the left, the others to the right; ``|`` in a cell is escaped."""

    def render(line: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |"

    rule = "|" + "|".join([" --- ", *[" ---: "] * (len(header) - 1)]) + "|"
    return "\n".join([render(header), rule, *map(render, rows)])


# ---- single values --------------------------------------------------------------------------------------------------


def number(value: float | None) -> str:
    """Four significant digits, no exponent below a million."""
    if value is None:
        return MISSING
    if abs(value) >= 1e6:
        return f"{value:.3g}"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def size(num_bytes: float | None) -> str:
    """Bytes in the unit (1000-based) that leaves one to three digits before the point."""
    if num_bytes is None:
        return MISSING
    value, unit = float(num_bytes), "B"
    for larger in ("kB", "MB", "GB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.4g} {unit}"


def duration(seconds: float | None) -> str:
    """Wall time: 4.2 s, 3 min 07 s, 2 h 05 min."""
    if seconds is None:
        return MISSING
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def change(before: float | None, after: float | None) -> str:
    """The relative change in percent, with its sign."""
    if not before or after is None:
        return MISSING
    return f"{100 * (after - before) / before:+.1f} %"


def percent(value: float) -> str:
    """Percent with its sign."""
    return f"{value:+.1f} %"


def known_bounds(interval: Sequence[float | None] | None) -> tuple[float, float] | None:
    """Lower and upper end of an interval, None where one is missing or not finite."""
    ends = [v for v in interval or () if v is not None and math.isfinite(v)]
    return (ends[0], ends[1]) if len(ends) == 2 else None


def bounds(interval: Sequence[float | None] | None) -> str:
    """An interval as ``18.9 to 22.4``."""
    ends = known_bounds(interval)
    return MISSING if ends is None else f"{number(ends[0])} to {number(ends[1])}"


def percent_bounds(interval: Sequence[float | None] | None) -> str:
    """An interval of percentages as ``-1.2 to +3.4 %``."""
    ends = known_bounds(interval)
    return MISSING if ends is None else f"{ends[0]:+.1f} to {ends[1]:+.1f} %"


def ranges(numbers: Iterable[int]) -> str:
    """Whole numbers with runs drawn together: ``0, 3-5, 9``."""
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and runs[-1][1] == n - 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def dropped_in_words(dropped: Iterable[int]) -> str:
    """Which sync points are dropped, by sublayer: ``attention of blocks 3-5; MLP of blocks 2``."""
    points = list(dropped)
    parts = []
    for name, parity in (("attention", 0), ("MLP", 1)):
        blocks = [p // 2 for p in points if p % 2 == parity]
        if blocks:
            parts.append(f"{name} of blocks {ranges(blocks)}")
    return "; ".join(parts) or "none"


def low_bit_note(low_bit: Mapping[int, str] | None) -> str:
    """Which sync points have a low-bit all-reduce, for the end of a sentence: ``; int8 after attention of blocks 0-2``.

    ``low_bit``: format by point (numbers, or their names in JSON). Empty where there is none.
    """
    points: dict[str, list[int]] = {}
    for point, collective in (low_bit or {}).items():
        points.setdefault(collective, []).append(int(point))
    return "".join(f"; {name} after {dropped_in_words(points[name])}" for name in sorted(points))


# ---- whole tables ---------------------------------------------------------------------------------------------------


#: What a run measured, in its order, by the names of ``results``.
_STEPS = {"zero_shot": "zero-shot", "grouped": "grouped", "final": "final"}


def summary(results: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows (what, before, after, change) of the figures that a user decides by; the 95 % interval of the
    change where one was measured."""
    perplexity, increases = results.get("perplexity") or {}, results.get("increase") or {}
    plain, total = perplexity.get("plain"), results.get("sync_points_total")
    kept = None if total is None else total - len(results.get("dropped") or ())
    rows: list[tuple[str, ...]] = [("sync points", number(total), number(kept), change(total, kept), "")]
    for step, name in _STEPS.items():
        value = perplexity.get(step)
        if value is None and step == "grouped":
            continue
        interval = percent_bounds(increases[step][1:]) if step in increases else ""
        rows.append((f"perplexity, {name}", number(plain), number(value), change(plain, value), interval))
    for what, key, form in (
        ("all-reduces per token", "all_reduces_per_token", number),
        ("bytes per token", "bytes_per_token", size),
    ):
        pair = results.get(key) or {}
        before, after = pair.get("before"), pair.get("after")
        rows.append((what, form(before), form(after), change(before, after), ""))
    header = ("", "plain", "SPD", "change", "95 %, paired")
    return (header, rows) if any(row[-1] for row in rows) else (header[:-1], [row[:-1] for row in rows])


INTERVAL_HEADER = ("", "perplexity", "95 %", "increase", "95 %, paired")


def interval_rows(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """(step, perplexity, its interval, increase over plain, its interval) of all that has an interval."""
    perplexity, intervals = results.get("perplexity") or {}, results.get("interval") or {}
    increases = results.get("increase") or {}
    rows: list[tuple[str, ...]] = []
    for step, name in {"plain": "plain", **_STEPS}.items():
        if step in intervals:
            increase = increases.get(step)
            rows.append(
                (
                    name,
                    number(perplexity.get(step)),
                    bounds(intervals[step]),
                    MISSING if increase is None else percent(increase[0]),
                    MISSING if increase is None else percent_bounds(increase[1:]),
                )
            )
    return rows


def stage_rows(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(stage, wall time), the total last."""
    stages = results.get("stage_seconds") or {}
    rows = [(name, duration(seconds)) for name, seconds in stages.items()]
    return [*rows, ("total", duration(sum(stages.values())))] if rows else []


def unit_rows(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """(blocks, tier, recovery, loss before, loss after, change) of every distilled unit."""
    tiers = {int(block): name for block, name in (results.get("tiers") or {}).items()}
    rows: list[tuple[str, ...]] = []
    for unit in results.get("units") or ():
        before, after = unit.get("loss_before"), unit.get("loss_after")
        names = sorted({tiers[b] for b in unit["blocks"] if b in tiers})
        rows.append(
            (
                ranges(unit["blocks"]),
                " ".join(names) or MISSING,
                unit.get("recovery") or MISSING,
                number(before),
                number(after),
                change(before, after),
            )
        )
    return rows


UNIT_HEADER = ("blocks", "tier", "recovery", "loss before", "loss after", "change")


def summary_table(results: Mapping[str, Any]) -> str:
    """What ``megatron-spd run`` prints at its end: figures, wall time per stage, where the results are."""
    parts = [
        f"{results.get('model', MISSING)}: G = {results.get('branches', MISSING)} branches, "
        f"M = {results.get('ranks', MISSING)} ranks",
        f"sync points dropped: {len(results.get('dropped') or ())} of {number(results.get('sync_points_total'))} "
        f"({dropped_in_words(results.get('dropped') or ())}){low_bit_note(results.get('low_bit'))}",
        "",
        text_table(*summary(results)),
    ]
    if stages := stage_rows(results):
        parts += ["", text_table(("stage", "wall time"), stages)]
    if paths := results.get("paths"):
        width = max(map(len, paths))
        parts += ["", *(f"{name.ljust(width)}  {path}" for name, path in paths.items())]
    return "\n".join(parts)


_SENSITIVITY_HEADER = ("sync point", "block", "after", "perplexity", "sensitivity", "Algorithm 1")


def sensitivity_rows(sensitivity: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header, and one row per measured sync point in the model's order: dropped alone, Algorithm 1's sensitivity
    beside it, and the sensitivity of each low-bit all-reduce."""
    algorithm1 = {2 * e["block"]: e for e in sensitivity.get("algorithm1") or ()}
    single = {e["point"]: e for e in sensitivity.get("single") or ()}
    low_bit = low_bit_by_format(sensitivity)
    points = algorithm1.keys() | single.keys() | {p for scores in low_bit.values() for p in scores}
    rows: list[tuple[str, ...]] = []
    for point in sorted(points):
        one, consecutive = single.get(point, {}), algorithm1.get(point, {})
        rows.append(
            (
                str(point),
                str(point // 2),
                "MLP" if point % 2 else "attention",
                number(one.get("perplexity")),
                _signed(one.get("sensitivity")),
                _signed(consecutive.get("sensitivity")),
                *(_signed(scores.get(point), digits=5) for scores in low_bit.values()),
            )
        )
    return (*_SENSITIVITY_HEADER, *low_bit), rows


def sensitivity_table(sensitivity: Mapping[str, Any]) -> str:
    """The sensitivity of every measured sync point as text, with what was measured on in the first line."""
    head = (
        f"plain perplexity {number(sensitivity.get('plain_perplexity'))}, "
        f"G = {sensitivity.get('branches', MISSING)}, {sensitivity.get('tokens', MISSING)} tokens"
    )
    return f"{head}\n\n{text_table(*sensitivity_rows(sensitivity))}"


def _signed(value: float | None, digits: int = 3) -> str:
    return MISSING if value is None else f"{value:+.{digits}f}"
