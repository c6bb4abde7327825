"""Numbers as text: units, alignment, what is missing."""

from __future__ import annotations

import math

import pytest

from megatron_spd.report import tables
from tests.unit.report.results import low_bit, older_results, results, sensitivity


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (27.2345, "27.23"), (0.00123456, "0.001235"), (46191.2, "46191"), (60, "60")],
)
def test_number(value, text):
    assert tables.number(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (0, "0 B"), (999, "999 B"), (138240, "138.2 kB"), (2.5e9, "2.5 GB"), (5e12, "5000 GB")],
)
def test_size(value, text):
    assert tables.size(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (4.24, "4.2 s"), (59.97, "1 min 00 s"), (187, "3 min 07 s"), (7500, "2 h 05 min")],
)
def test_duration(value, text):
    assert tables.duration(value) == text


def test_change():
    assert tables.change(20.0, 25.0) == "+25.0 %"
    assert tables.change(60, 39) == "-35.0 %"
    assert tables.change(None, 1.0) == tables.change(0, 1.0) == tables.change(1.0, None) == "-"


def test_ranges_and_drops_in_words():
    assert tables.ranges([5, 3, 4, 0, 9]) == "0, 3-5, 9"
    assert tables.ranges([]) == ""
    assert tables.dropped_in_words([4, 6, 8, 12, 5]) == "attention of blocks 2-4, 6; MLP of blocks 2"
    assert tables.dropped_in_words([]) == "none"


def test_text_table_is_aligned():
    text = tables.text_table(("name", "x"), [("a", "1"), ("longer", "23.5")])
    assert text.splitlines() == ["name       x", "------  ----", "a          1", "longer  23.5"]


def test_markdown_table_escapes():
    text = tables.markdown_table(("a", "b"), [("x|y", "1\n2")])
    assert text.splitlines() == ["| a | b |", "| --- | ---: |", "| x\\|y | 1 2 |"]


def test_summary_says_what_a_user_decides_by():
    text = tables.summary_table(results())
    assert "sync points dropped: 4 of 12 (attention of blocks 1, 3-4; MLP of blocks 2)" in text
    rows = {line.split("  ")[0]: line.split() for line in text.splitlines()}
    assert " ".join(rows["perplexity, zero-shot"][2:]) == "20 25 +25.0 % +22.2 to +28.0 %"
    assert " ".join(rows["perplexity, grouped"][2:]) == "20 22 +10.0 % +8.5 to +12.0 %"
    assert " ".join(rows["perplexity, final"][2:]) == "20 21 +5.0 % +4.0 to +6.5 %"
    assert rows["all-reduces per token"][-4:] == ["12", "8", "-33.3", "%"]
    assert rows["bytes per token"][-6:] == ["27.65", "kB", "18.43", "kB", "-33.3", "%"]
    assert rows["total"][-4:] == ["3", "min", "11", "s"]
    assert "checkpoint  RUN/export" in text


def test_summary_without_intervals_has_no_column_for_them():
    header, rows = tables.summary(older_results())
    assert header == ("", "plain", "SPD", "change")
    assert [row[0] for row in rows] == [
        "sync points",
        "perplexity, zero-shot",
        "perplexity, final",
        "all-reduces per token",
        "bytes per token",
    ]


def test_intervals():
    assert tables.interval_rows(results()) == [
        ("plain", "20", "18 to 22.5", "-", "-"),
        ("zero-shot", "25", "23 to 27", "+25.0 %", "+22.2 to +28.0 %"),
        ("grouped", "22", "20 to 24", "+10.0 %", "+8.5 to +12.0 %"),
        ("final", "21", "19 to 23", "+5.0 %", "+4.0 to +6.5 %"),
    ]
    # One sequence alone gives none; JSON has no NaN.
    for unknown in ([math.nan, math.nan], [None, None], None):
        assert tables.bounds(unknown) == tables.percent_bounds(unknown) == "-"


def test_summary_of_a_run_that_measured_little():
    text = tables.summary_table(
        {"model": "m", "branches": 2, "ranks": 1, "sync_points_total": 4, "dropped": []}
    )
    assert "sync points dropped: 0 of 4 (none)" in text
    assert text.splitlines()[-1].split() == ["bytes", "per", "token", "-", "-", "-"]


def test_sensitivity_table():
    lines = tables.sensitivity_table(sensitivity()).splitlines()
    assert lines[0] == "plain perplexity 20, G = 3, 512 tokens"
    assert len(lines) == 4 + 11
    assert lines[4].split() == ["0", "0", "attention", "60", "+40.000", "+60.000"]
    assert lines[5].split() == ["1", "0", "MLP", "60", "+40.000", "-"]


def test_sensitivity_table_of_algorithm1_alone():
    header, rows = tables.sensitivity_rows(sensitivity() | {"single": None})
    assert header[-1] == "Algorithm 1"
    assert [row[0] for row in rows] == ["0", "2", "4", "6", "8", "10"]
    assert rows[0][3:] == ("-", "-", "+60.000")


def test_sensitivity_table_with_low_bit_points():
    header, rows = tables.sensitivity_rows(sensitivity() | {"low_bit": low_bit()})
    assert header[-3:] == ("Algorithm 1", "int8", "int4:g64")
    # The last MLP point cannot be dropped, but be low-bit.
    assert rows[-1] == ("11", "5", "MLP", "-", "-", "-", "+0.00110", "+1.10000")
    assert rows[0][-3:] == ("+60.000", "+0.00000", "+0.00000")


def test_unit_rows():
    assert tables.unit_rows(results()) == [
        ("2-3", "ESB SB", "hg+b2b", "0.5", "0.25", "-50.0 %"),
        ("4", "ISB", "b2b", "0.1", "0.09", "-10.0 %"),
    ]
