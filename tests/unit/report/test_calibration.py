"""The guard's verdicts as a table, in words, and as a picture."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

from megatron_spd.report.calibration import (
    calibration_section,
    guard_rows,
    head_rows,
    kept_in_words,
    plot_guard,
)
from megatron_spd.report.style import PALETTE
from tests.unit.report.pixels import pixels_of
from tests.unit.report.results import calibration


def test_every_sublayer_with_a_choice_has_a_row() -> None:
    assert guard_rows(calibration()) == [
        ("1", "MLP", "0.08", "0.02", "-75.0 %", "shift + neurons"),
        ("2", "MLP", "0.3", "0.1", "-66.7 %", "neurons"),
        ("3", "attention", "0.2", "0.2", "+0.0 %", "nothing"),
        ("3", "MLP", "0.03", "0.03", "+0.0 %", "nothing"),
    ]


def test_orders_of_heads_side_by_side() -> None:
    assert head_rows(calibration()) == [
        ("1", "0.04", "0.05", "0.02", "joint"),
        ("3", "0.03", "0.04", "-", "in place"),
    ]


@pytest.mark.parametrize(
    ("candidate", "words"),
    [
        ("none", "nothing"),
        ("none + neurons", "neurons"),
        ("refit", "refit"),
        ("norm + neurons", "norm + neurons"),
    ],
)
def test_what_was_kept_in_words(candidate: str, words: str) -> None:
    assert kept_in_words(candidate) == words


def test_the_section_counts_and_compares() -> None:
    words = " ".join(calibration_section(calibration(), {}).paragraphs)
    assert "Kept: nothing in 2, shift + neurons in 1, neurons in 1 sublayers." in words
    assert "lower error than the published order in 1 of 1 blocks; geometric mean -60.0 %." in words
    worse = copy.deepcopy(calibration())
    worse[2]["errors"]["heads"]["joint"] = 0.16
    # 0.4 and 4.0 times: 1.265 on geometric average.
    words = " ".join(calibration_section(worse, {}).paragraphs)
    assert "in 1 of 2 blocks; geometric mean +26.5 %." in words


def test_the_picture_shows_what_was_kept(tmp_path: Path) -> None:
    path = plot_guard(calibration(), tmp_path / "guard.png")
    neurons = [calibration()[1]]
    alone = plot_guard(neurons, tmp_path / "neurons.png")
    # "nothing" is the most frequent and grey; then the colours from the end of the palette.
    assert pixels_of(path, PALETTE[-2]) > 40
    assert pixels_of(alone, PALETTE[-1]) > 40
    assert pixels_of(alone, PALETTE[-2]) == 0
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_guard([{"block": 0, "errors": {}, "kept": {}}], tmp_path / "none.png")
