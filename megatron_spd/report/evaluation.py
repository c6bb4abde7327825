"""What ``evaluate`` found, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_spd.report.tables import MISSING, low_bit_note, text_table


def evaluation_text(result: Mapping[str, Any]) -> str:
    """The result of :func:`megatron_spd.evaluate.folders.measure_folders` for people."""
    confidence = f"{100 * result['confidence']:g} %"
    other = result.get("against")
    lines = [_perplexity(folder, result["tokens"], confidence) for folder in (result, other) if folder]
    if other is not None:
        low, high = other["increase_interval"]
        bounds = _bounds(f"{low:+.2f}", f"{high:+.2f} %", confidence + ", paired")
        lines.append(f"perplexity increase: {other['increase']:+.2f} %{bounds}")
    if "generation" in result:
        found = result["generation"]
        lines.append(
            f"greedy continuations by {found['new_tokens']} tokens of {found['prompts']} prompts: "
            f"{100 * found['agreement']:.1f} % of the next tokens agree, the first {found['same_prefix']:.1f} tokens "
            f"are the same, ROUGE-L {100 * found['rouge_l']:.1f} %"
        )
    if "tasks" in result:
        lines += ["", _tasks(result["tasks"], None if other is None else other["tasks"])]
    return "\n".join(lines)


def _perplexity(folder: Mapping[str, Any], tokens: int, confidence: str) -> str:
    kind = "plain"
    if folder["kind"] == "spd":
        kind = f"SPD, {len(folder['dropped'])} of {folder['sync_points']} sync points dropped"
        kind += low_bit_note(folder.get("low_bit"))
    low, high = folder["interval"]
    bounds = _bounds(f"{low:.4f}", f"{high:.4f}", confidence)
    return f"{folder['model']} ({kind}): perplexity {folder['perplexity']:.4f}{bounds} on {tokens} tokens"


def _bounds(low: str, high: str, name: str) -> str:
    """An interval in brackets; nothing where one sequence gave none."""
    return "" if "nan" in low else f" ({name}: {low} to {high})"


def _tasks(tasks: Mapping[str, Any], others: Mapping[str, Any] | None) -> str:
    """A row for each task and metric; the other folder's value beside it."""
    rows = []
    for name, found in tasks.items():
        for metric, measured in found.items():
            if metric == "documents":
                continue
            row = [name, metric, str(found["documents"] or MISSING), _value(measured)]
            rows.append(row if others is None else [*row, _value(others[name][metric])])
    header = ["task", "metric", "documents", "value"]
    return text_table(header if others is None else [*header, "of the other"], rows)


def _value(measured: Mapping[str, Any]) -> str:
    error = "" if measured["stderr"] is None else f" +- {measured['stderr']:.4f}"
    return f"{measured['value']:.4f}{error}"
