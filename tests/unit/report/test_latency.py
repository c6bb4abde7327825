"""Tables and pictures of a latency benchmark."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_spd.report.latency import (
    BREAKDOWN_HEADER,
    HEADER,
    breakdown_rows,
    latency_text,
    phase_rows,
    write_latency_report,
)
from megatron_spd.report.latency_plots import PARTS
from megatron_spd.report.style import PALETTE
from tests.unit.report.pixels import pixels_of


def phase(seconds: float, calls: int, predicted: float) -> dict[str, Any]:
    saved = 0.2 - seconds
    return {
        "seconds": {"median": seconds, "low": 0.9 * seconds, "high": 1.1 * seconds},
        "calls": calls,
        "num_bytes": 1000 * calls,
        "sent": 1500.0 * calls,
        "inside_calls": 0,
        "inside_bytes": 0,
        "inside_sent": 0.0,
        "saving": {
            "measured": {"median": saved, "low": saved, "high": saved},
            "change": {"median": -saved / 0.2, "low": -saved / 0.2, "high": -saved / 0.2},
            "predicted": predicted,
            "bound": predicted / 2,
            "of_predicted": saved / predicted if predicted else None,
        },
        "breakdown": {
            "total": {"compute": 0.06, "communication": seconds / 4, "wait": seconds / 4},
            "outside": {"compute": 0.01, "communication": 0.0, "wait": 0.0},
            "blocks": {part: [0.01, 0.02, 0.03] for part in PARTS},
        },
    }


def benchmark(gigabits: float | None = 1.0) -> dict[str, Any]:
    figures = {"plain": (0.2, 6, 0.0), "4 of 6 dropped": (0.15, 2, 0.04), "no communication": (0.1, 0, 0.08)}
    variants = {name: {"first_token": phase(*f), "next_token": phase(*f)} for name, f in figures.items()}
    case = {"batch": 2, "prompt": 128, "new_tokens": 16, "variants": variants}
    link = {"gigabits": gigabits, "seconds_per_call": 3e-4, "bytes_per_second": 1.1e8, "nominal": None}
    link["inside"] = {}
    return {
        "model": "some/model",
        "ranks": 3,
        "ranks_per_node": None,
        "backend": "gloo",
        "device": "cpu",
        "cores": 2,
        "threads": 1,
        "dtype": "float32",
        "rounds": 10,
        "variants": {name: {} for name in figures},
        "links": [{**link, "cases": [case]}],
    }


def test_what_is_summed_inside_branches_stands_behind_a_plus() -> None:
    hierarchical = benchmark()
    hierarchical |= {"ranks": 4, "ranks_per_node": 2}
    link = hierarchical["links"][0]
    link["inside"] = {"2": {"seconds_per_call": 1e-4, "bytes_per_second": 1.1e9, "nominal": None}}
    inside = {"inside_calls": 4, "inside_bytes": 4000, "inside_sent": 4000.0}
    link["cases"][0]["variants"]["4 of 6 dropped"]["first_token"] |= inside
    row = phase_rows(link["cases"][0], "first_token")[1]
    assert row[1:3] == ("2 + 4", "2 kB + 4 kB")
    assert "M = 4 ranks on 2 nodes over gloo" in latency_text(hierarchical, {})


def test_rows_stand_beside_the_bound() -> None:
    rows = phase_rows(benchmark()["links"][0]["cases"][0], "first_token")
    assert all(len(row) == len(HEADER) for row in rows)
    assert rows[0] == ("plain", "6", "6 kB", "200", "180 to 220", "", "", "", "", "")
    assert rows[1] == (
        "4 of 6 dropped",
        "2",
        "2 kB",
        "150",
        "135 to 165",
        "-25.0 %",
        "50",
        "40",
        "125 %",
        "20",
    )
    assert rows[2][-3:-1] == ("80", "125 %")


def test_a_share_of_nothing_is_not_shown() -> None:
    made = benchmark()
    made["links"][0]["cases"][0]["variants"]["4 of 6 dropped"]["first_token"] = phase(0.2, 6, 0.0)
    assert phase_rows(made["links"][0]["cases"][0], "first_token")[1][8] == "-"


def test_breakdown_rows() -> None:
    rows = breakdown_rows(benchmark()["links"][0]["cases"][0], "next_token")
    assert all(len(row) == len(BREAKDOWN_HEADER) for row in rows)
    assert rows[0] == ("plain", "60", "50", "50", "62 %")


def test_report_is_written_whole(tmp_path: Path) -> None:
    made = benchmark()
    paths = write_latency_report(made, tmp_path / "out")
    assert sorted(Path(p).name for p in paths.values()) == [
        "bench.html",
        "bench.json",
        "bench.md",
        "bench.png",
        "breakdown.png",
    ]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(
        Path(p).name for p in paths.values()
    )
    assert json.loads((tmp_path / "out/bench.json").read_text()) == made
    text = (tmp_path / "out/bench.md").read_text()
    assert "1 Gbit/s, batch 2, prompt 128, 16 new tokens" in text
    assert "takes 0.3 ms, a large one sends 0.88 Gbit/s" in text
    # One colour for each variant, the limit grey; one for each part.
    for colour in (PALETTE[1], PALETTE[2], PALETTE[0]):
        assert pixels_of(tmp_path / "out/bench.png", colour) > 500
    for colour in PARTS.values():
        assert pixels_of(tmp_path / "out/breakdown.png", colour) > 500


def test_text_names_the_link_and_the_files() -> None:
    text = latency_text(benchmark(None), {"markdown": "out/bench.md"})
    assert "M = 3 ranks over gloo on cpu (2 cores, 1 threads a rank), float32, 10 rounds" in text
    assert "time to first token: link as it is, batch 2" in text
    assert text.endswith("markdown  out/bench.md")
