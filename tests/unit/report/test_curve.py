"""The curve's tables and pictures: drawn from the data, and only what was measured."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest

from megatron_spd.report.curve import LABELS, cell_rows, curve_text, write_curve_report
from megatron_spd.report.curve_plots import mean_accuracy, plot_curve, plot_orders
from megatron_spd.report.style import PALETTE
from tests.unit.report.pixels import pixels_of
from tests.unit.report.results import curve


def without(kept: Any, **changes: Any) -> dict[str, Any]:
    """The curve with only those cells for which ``kept`` is true."""
    return curve() | {"cells": [c for c in curve()["cells"] if kept(c)]} | changes


def test_the_report_holds_tables_and_pictures(tmp_path: Path) -> None:
    written = write_curve_report(curve(), tmp_path / "deep" / "curve")
    assert written.keys() == {"html", "markdown", "curve", "orders"}
    assert set((tmp_path / "deep" / "curve").iterdir()) == set(written.values())
    html = written["html"].read_text(encoding="utf-8")
    for name in ("curve", "orders"):
        assert base64.b64encode(written[name].read_bytes()).decode() in html
    markdown = written["markdown"].read_text(encoding="utf-8")
    assert re.findall("^## .*", markdown, re.MULTILINE) == [
        "## Perplexity",
        "## Accuracy",
        "## Order of sensitivity before and after grouping",
    ]
    assert "Every branch has one key/value group here" in markdown
    assert "| zero-shot | 1 | 11 | 40 | 34 to 46 | +100.0 % | +90.0 to +120.0 % |" in markdown
    assert "Spearman correlation of the two orders: 0.875" in markdown


def test_one_table_compares_the_variants() -> None:
    rows = {line[:26].strip(): " ".join(line[26:].split()) for line in curve_text(curve()).splitlines()[2:11]}
    assert rows["dropped"] == "3 of 12 6 of 12 11 of 12"
    assert rows["zero-shot"] == "21.25 (+6.2 %) 25 (+25.0 %) 40 (+100.0 %)"
    assert rows["+ all, distilled, finished"] == "20.12 (+0.6 %) 20.5 (+2.5 %) 22 (+10.0 %)"


def test_what_was_not_measured_is_left_out() -> None:
    part = without(
        lambda c: c["variant"] != "shift" and (c["variant"], c["ratio"]) != ("heads", 0.5), orders=None
    )
    text = curve_text(part)
    assert "+ shift" not in text
    (heads,) = [line for line in text.splitlines() if line.startswith("+ heads")]
    assert " ".join(heads.split()[3:]) == "21.12 (+5.6 %) - 38 (+90.0 %)"
    assert "Spearman" not in text
    assert len(cell_rows(part)) == 17


def test_a_line_for_every_variant(tmp_path: Path) -> None:
    cells = without(lambda c: c["tasks"] is None)
    path = plot_curve(cells, LABELS, tmp_path / "two.png")
    # Without the two variants that have tasks: their colours are missing, and so is the second panel.
    drawn = [pixels_of(path, colour) > 300 for colour in PALETTE]
    assert drawn == [name not in ("zero-shot", "all") for name in LABELS]
    both = plot_curve(curve(), LABELS, tmp_path / "all.png")
    assert all(pixels_of(both, colour) > 300 for colour in PALETTE)
    assert matplotlib.image.imread(both).shape[1] > 1.5 * matplotlib.image.imread(path).shape[1]


def test_the_picture_says_where_heads_have_no_choice_of_company(tmp_path: Path) -> None:
    alone = plot_curve(curve(), LABELS, tmp_path / "alone.png").read_bytes()
    assert plot_curve(curve(), LABELS, tmp_path / "again.png").read_bytes() == alone
    several = curve() | {"key_value_groups": 6}
    assert plot_curve(several, LABELS, tmp_path / "several.png").read_bytes() != alone


def test_bars_are_the_paired_intervals(tmp_path: Path) -> None:
    narrow = without(lambda c: c["variant"] == "finish")
    wide = without(lambda c: c["variant"] == "finish")
    for cell in wide["cells"]:
        cell["increase"] = [cell["increase"][0], cell["increase"][0] - 8, cell["increase"][0] + 8]
    few, many = (
        pixels_of(plot_curve(c, LABELS, tmp_path / f"{i}.png"), PALETTE[-1])
        for i, c in enumerate((narrow, wide))
    )
    assert many > 1.1 * few


def test_one_sequence_gives_no_bars(tmp_path: Path) -> None:
    alone = without(lambda c: c["variant"] == "finish")
    for cell in alone["cells"]:
        cell["increase"][1:] = [None, None]
        cell["interval"] = [None, None]
    assert pixels_of(plot_curve(alone, LABELS, tmp_path / "c.png"), PALETTE[-1]) > 300
    assert all(row[4] == row[6] == "-" for row in cell_rows(alone))


def test_accuracy_is_the_mean_over_tasks_that_have_one() -> None:
    found = {
        "a": {"documents": 4, "acc": {"value": 0.5, "stderr": 0.3}},
        "b": {"documents": 4, "acc": {"value": 0.7, "stderr": 0.4}},
        "c": {"documents": 4, "perplexity": {"value": 9.0, "stderr": None}},
    }
    assert mean_accuracy(found) == (pytest.approx(0.6), pytest.approx(0.25))
    assert mean_accuracy({"c": found["c"]}) is None
    assert mean_accuracy(None) is None


def test_orders_tell_attention_from_mlp(tmp_path: Path) -> None:
    orders = curve()["orders"]
    both = plot_orders(orders, tmp_path / "both.png")
    assert min(pixels_of(both, PALETTE[3]), pixels_of(both, PALETTE[6])) > 100
    attention = orders | {"points": [p for p in orders["points"] if p["point"] % 2 == 0]}
    assert pixels_of(plot_orders(attention, tmp_path / "a.png"), PALETTE[6]) == 0
