"""An optimised plan in words, and its measured choices as a table."""

from __future__ import annotations

from typing import Any

from megatron_spd.report.optimized import optimized_section, optimized_text

CHOICE = ["none", "int8", "full", "int8"]


def record() -> dict[str, Any]:
    figures = {
        "sync_points": CHOICE,
        "cost": 3546.0,
        "predicted": 20.3,
        "equivalent": 20.36,
        "perplexity": 20.2,
    }
    dearer = figures | {"sync_points": ["int8"] * 4, "cost": 2484.0, "equivalent": 21.0}
    return {
        "objective": "bytes",
        "limit": 2.0,
        "cost": {"before": 9216.0, "after": 3546.0},
        "points": {"none": 1, "int8": 2, "full": 1},
        "predicted_increase": 1.5,
        "measured": {"plain": 20.0, **figures, "increase": 1.8, "history": [dearer, figures]},
    }


def test_words() -> None:
    assert optimized_text(record()).splitlines() == [
        "bytes per token: 9.216 kB before, 3.546 kB after (-61.5 %)",
        "sync points: 1 dropped, 2 int8, 1 full",
        "perplexity, allowed +2.0 %: predicted +1.5 %, measured +1.8 % (20 to 20.2; by divergence 20.36; 2 sets "
        "measured)",
    ]


def test_time_and_no_measurement() -> None:
    told = record() | {"objective": "latency", "cost": {"before": 0.25, "after": 0.1}, "measured": None}
    lines = optimized_text(told).splitlines()
    assert lines[0] == "predicted time of a prompt's collectives: 250 ms before, 100 ms after (-60.0 %)"
    assert lines[2].endswith("predicted +1.5 %")
    assert optimized_section(told).tables == []


def test_the_section_has_a_row_for_every_measured_choice() -> None:
    section = optimized_section(record())
    assert section.paragraphs == optimized_text(record()).splitlines()
    (table,) = section.tables
    assert table.header == (
        *("set", "dropped", "int8", "full", "cost", "predicted", "by divergence", "perplexity"),
    )
    assert table.rows == [
        ("1", "0", "4", "0", "2.484 kB", "20.3", "21", "20.2"),
        ("2", "1", "2", "1", "3.546 kB", "20.3", "20.36", "20.2"),
    ]
