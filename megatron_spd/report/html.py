"""The report of a run: one self-contained ``report.html``, the same as ``report.md``, and the pictures.

The *results* dict, all but the first five optional (None or missing where a run did not measure it):

``model``, ``branches`` (G), ``ranks`` (M), ``sync_points_total`` (2L), ``dropped`` (points); ``perplexity``
{plain, zero_shot, final}; ``all_reduces_per_token`` and ``bytes_per_token`` {before, after};
``stage_seconds`` {stage: s}; ``paths`` {what: path}; ``units`` [{blocks, recovery, loss_before, loss_after,
losses}]; ``samples`` {prompt, plain, spd}; ``tiers`` {block: tier}; ``thresholds`` {tau1, tau2};
``sensitivity`` (the sweep's JSON); ``notes`` [text].
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from megatron_spd.files import write_atomic
from megatron_spd.report import plots, tables
from megatron_spd.sensitivity.tiers import Thresholds


@dataclass(frozen=True)
class Table:
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Section:
    """One heading of the report and what stands under it, in this order."""

    title: str
    paragraphs: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    #: (caption, PNG)
    pictures: list[tuple[str, Path]] = field(default_factory=list)
    #: (label, text kept as it is)
    quotes: list[tuple[str, str]] = field(default_factory=list)


def write_report(results: Mapping[str, Any], out_dir: Path) -> dict[str, Path]:
    """Write the report into ``out_dir`` (made if missing), every file whole or not at all.

    Returns:
        Paths under ``html`` and ``markdown``, and of the pictures drawn: ``perplexity``, ``sensitivity``, ``losses``.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    pictures = _draw(results, out_dir)
    title = f"SPD report: {results.get('model', 'model')}"
    sections = _sections(results, pictures)
    written = dict(pictures)
    for kind, name, text in (
        ("html", "report.html", _html(title, sections)),
        ("markdown", "report.md", _markdown(title, sections)),
    ):
        written[kind] = write_atomic(out_dir / name, partial(Path.write_text, data=text, encoding="utf-8"))
    return written


def _draw(results: Mapping[str, Any], out_dir: Path) -> dict[str, Path]:
    """Whichever pictures the results have numbers for."""
    pictures = {}
    if any((results.get("perplexity") or {}).values()):
        pictures["perplexity"] = plots.plot_perplexity(results["perplexity"], out_dir / "perplexity.png")
    sensitivity = results.get("sensitivity") or {}
    if sensitivity.get("algorithm1") or sensitivity.get("single"):
        given = results.get("thresholds")
        limits = Thresholds(given["tau1"], given["tau2"]) if given else None
        pictures["sensitivity"] = plots.plot_sensitivity(
            sensitivity, limits, out_dir / "sensitivity.png", results.get("dropped") or ()
        )
    if any(unit.get("losses") for unit in results.get("units") or ()):
        pictures["losses"] = plots.plot_losses(results["units"], out_dir / "losses.png")
    return pictures


def _sections(results: Mapping[str, Any], pictures: Mapping[str, Path]) -> list[Section]:
    """The report as data; sections without content are left out."""
    dropped = results.get("dropped") or ()
    total = tables.number(results.get("sync_points_total"))
    about = (
        f"{results.get('model', 'The model')} with G = {results.get('branches', '?')} branches, run on "
        f"M = {results.get('ranks', '?')} tensor-parallel ranks. {len(dropped)} of {total} sync points are dropped: "
        f"{tables.dropped_in_words(dropped)}."
    )
    sections = [
        Section(
            "Result",
            [about, *results.get("notes", ())],
            [Table(tables.SUMMARY_HEADER, tables.summary_rows(results))],
            _pictures(pictures, perplexity="Perplexity of the plain and of the SPD model"),
        )
    ]
    if samples := results.get("samples"):
        labels = {"prompt": "Prompt", "plain": "Plain model", "spd": "SPD model"}
        sections.append(
            Section("Generated text", quotes=[(labels[k], samples[k]) for k in labels if k in samples])
        )
    if results.get("tiers"):
        sections.append(_tier_section(results))
    if results.get("units"):
        sections.append(
            Section(
                "Block-to-block distillation",
                tables=[Table(tables.UNIT_HEADER, tables.unit_rows(results))],
                pictures=_pictures(
                    pictures, losses="Loss of every unit over its steps, and before and after"
                ),
            )
        )
    if results.get("sensitivity"):
        sections.append(
            Section(
                "Sensitivity of the sync points",
                tables=[Table(tables.SENSITIVITY_HEADER, tables.sensitivity_rows(results["sensitivity"]))],
                pictures=_pictures(pictures, sensitivity="Rise in perplexity per sync point"),
            )
        )
    if stages := tables.stage_rows(results):
        sections.append(Section("Wall time", tables=[Table(("stage", "wall time"), stages)]))
    if paths := results.get("paths"):
        rows = [(name, str(path)) for name, path in paths.items()]
        sections.append(Section("Files", tables=[Table(("", "path"), rows)]))
    return sections


def _pictures(pictures: Mapping[str, Path], **captions: str) -> list[tuple[str, Path]]:
    return [(caption, pictures[name]) for name, caption in captions.items() if name in pictures]


def _tier_section(results: Mapping[str, Any]) -> Section:
    names = {block: tier for block, tier in results["tiers"].items() if tier}
    rows = []
    for tier, label in plots.TIER_NAMES.items():
        blocks = [int(block) for block, name in names.items() if name == tier]
        rows.append((label, str(len(blocks)), tables.ranges(blocks) or tables.MISSING))
    given = results.get("thresholds")
    text = f"tau1 = {tables.number(given['tau1'])}, tau2 = {tables.number(given['tau2'])}." if given else ""
    return Section(
        "Tiers of the blocks with dropped points", [text] if text else [], [Table(("", "", "blocks"), rows)]
    )


def _markdown(title: str, sections: Sequence[Section]) -> str:
    """Pictures by file name: they lie beside the report."""
    parts = [f"# {title}"]
    for section in sections:
        parts.append(f"## {section.title}")
        parts += section.paragraphs
        parts += [tables.markdown_table(table.header, table.rows) for table in section.tables]
        parts += [f"![{caption}]({path.name})" for caption, path in section.pictures]
        parts += [f"{label}:\n\n{_indented(text)}" for label, text in section.quotes]
    return "\n\n".join(parts) + "\n"


def _indented(text: str) -> str:
    """A Markdown code block that no text can end early."""
    return "\n".join("    " + line for line in text.splitlines() or [""])


def _html(title: str, sections: Sequence[Section]) -> str:
    """Pictures as data URIs: the file can be mailed alone."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["data_uri"] = lambda path: (
        "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")
    )
    return environment.from_string(_TEMPLATE).render(title=title, sections=sections)


_TEMPLATE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid #eee; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 1rem 0; } img { max-width: 100%; height: auto; } figcaption { color: #666; font-size: .9em; }
pre { background: #f6f6f6; padding: .7rem 1rem; white-space: pre-wrap; overflow-wrap: anywhere; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
{% for section in sections %}
<h2>{{ section.title }}</h2>
{% for text in section.paragraphs %}
<p>{{ text }}</p>
{% endfor %}
{% for table in section.tables %}
<div class="wide"><table>
<thead><tr>{% for cell in table.header %}<th>{{ cell }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in table.rows %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table></div>
{% endfor %}
{% for caption, path in section.pictures %}
<figure><img src="{{ path | data_uri }}" alt="{{ caption }}"><figcaption>{{ caption }}</figcaption></figure>
{% endfor %}
{% for label, text in section.quotes %}
<p>{{ label }}</p>
<pre>{{ text }}</pre>
{% endfor %}
{% endfor %}
</body>
</html>
"""
