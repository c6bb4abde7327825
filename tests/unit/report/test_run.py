"""The report: self-contained, escaped, the same content in both forms, and whole files only."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser

import pytest

from megatron_spd.files import write_atomic
from megatron_spd.report.run import write_report
from tests.unit.report.results import older_results, results

PICTURES = ("perplexity", "sensitivity", "search", "guard", "losses", "finish")
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Collects text and image sources, and fails on tags that do not nest."""

    def __init__(self, text):
        super().__init__()
        self.open, self.images, self.text, self.tags = [], [], [], set()
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag == "img":
            self.images.append(dict(attrs)["src"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data.strip())


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The report of a whole run, in a folder that did not exist."""
    return write_report(results(), tmp_path_factory.mktemp("run") / "deep" / "report")


def test_report_of_a_whole_run(written):
    assert written.keys() == {"html", "markdown", *PICTURES}
    assert set(written["html"].parent.iterdir()) == set(written.values())

    page = Page(written["html"].read_text(encoding="utf-8"))
    markdown = written["markdown"].read_text(encoding="utf-8")
    for words in (
        "+25.0 %",
        "27.65 kB",
        "2-3",
        "extremely sensitive (ESB)",
        "3 min 11 s",
        "+40.000",
        "RUN/export",
        "+22.2 to +28.0 %",
        "18 to 22.5",
        "shift + neurons",
        "extension",
    ):
        assert words in page.text
        assert words in markdown


def test_html_stands_alone_and_escapes(written):
    text = written["html"].read_text(encoding="utf-8")
    page = Page(text)
    assert "b" not in page.tags
    assert "The <b>" in page.text
    drawn = {base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in page.images}
    assert drawn == {written[name].read_bytes() for name in PICTURES}
    assert not re.search(r'(src|href)="(?!data:)', text)


def test_markdown_points_to_the_pictures_beside_it(written):
    markdown = written["markdown"].read_text(encoding="utf-8")
    names = re.findall(r"!\[[^]]*\]\(([^)]*)\)", markdown)
    assert sorted(names) == sorted(f"{name}.png" for name in PICTURES)
    assert all((written["markdown"].parent / name).is_file() for name in names)
    assert "\n    one & two\n    ```\n" in markdown


def test_report_of_a_run_without_the_newer_measurements(tmp_path):
    written = write_report(older_results(), tmp_path)
    assert written.keys() == {"html", "markdown", "perplexity", "sensitivity", "losses"}
    markdown = written["markdown"].read_text(encoding="utf-8")
    assert re.findall("^## .*", markdown, re.MULTILINE) == [
        "## Result",
        "## Generated text",
        "## Tiers of the blocks with dropped points",
        "## Block-to-block distillation",
        "## Sensitivity of the sync points",
        "## Wall time",
        "## Files",
    ]
    assert "95 %" not in markdown
    assert "plain x exp(KL)" not in markdown


def test_report_of_a_run_without_training_or_search(tmp_path):
    none = {"search": None, "calibration": [], "units": [], "finish": None}
    assert write_report(results() | none, tmp_path).keys() == {
        "html",
        "markdown",
        "perplexity",
        "sensitivity",
    }


def test_report_of_a_run_that_measured_little(tmp_path):
    little = {"model": "m", "branches": 2, "ranks": 1, "sync_points_total": 4, "dropped": []}
    written = write_report(little, tmp_path)
    assert written.keys() == {"html", "markdown"}
    assert re.findall("^## .*", written["markdown"].read_text(), re.MULTILINE) == ["## Result"]
    Page(written["html"].read_text())


def test_writing_again_replaces(tmp_path):
    little = {"model": "m", "dropped": [], "perplexity": {"plain": 20.0}}
    write_report(little, tmp_path)
    again = write_report(little | {"model": "other"}, tmp_path)
    assert "# SPD report: other" in again["markdown"].read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["perplexity.png", "report.html", "report.md"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "report.md"
    path.write_text("old")

    def half_then_full_disk(temporary):
        temporary.write_text("new, but only ha")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, half_then_full_disk)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
