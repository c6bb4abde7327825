"""Documents of tables and pictures: one self-contained HTML file and the same in Markdown."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from megatron_spd.files import write_atomic
from megatron_spd.report.tables import markdown_table


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


def write_document(title: str, sections: Sequence[Section], folder: Path, name: str) -> dict[str, Path]:
    """Write ``NAME.html`` and ``NAME.md`` into ``folder`` (made if missing), each whole or not at all; the paths under
    ``html`` and ``markdown``. Pictures must lie in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    for kind, suffix, text in (
        ("html", "html", _html(title, sections)),
        ("markdown", "md", _markdown(title, sections)),
    ):
        write = partial(Path.write_text, data=text, encoding="utf-8")
        written[kind] = write_atomic(folder / f"{name}.{suffix}", write)
    return written


def pictures_of(drawn: Mapping[str, Path], **captions: str) -> list[tuple[str, Path]]:
    """(caption, PNG) of those pictures of ``captions`` that were drawn."""
    return [(caption, drawn[name]) for name, caption in captions.items() if name in drawn]


def _markdown(title: str, sections: Sequence[Section]) -> str:
    """Pictures by file name: they lie beside the report."""
    parts = [f"# {title}"]
    for section in sections:
        parts.append(f"## {section.title}")
        parts += section.paragraphs
        parts += [markdown_table(table.header, table.rows) for table in section.tables]
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
