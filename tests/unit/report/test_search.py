"""What the search measured, as a table, in words, and as a picture."""

from __future__ import annotations

from pathlib import Path

import matplotlib.image
import pytest

from megatron_spd.report.search import has_measurements, plot_search, search_rows, search_section
from tests.unit.report.pixels import pixels_of
from tests.unit.report.results import search


def test_every_set_has_a_row_with_the_best_of_its_size_so_far() -> None:
    assert search_rows(search()["history"]) == [
        ("1", "start", "4", "26", "30", "+15.4 %", "30"),
        ("2", "start", "4", "27", "inf", "+inf %", "30"),
        ("3", "extension", "3", "22", "23", "+4.5 %", "23"),
        ("4", "exchange", "4", "25", "24", "-4.0 %", "24"),
        ("5", "optimum", "4", "23.5", "26", "+10.6 %", "24"),
    ]


def test_the_section_says_what_the_search_gained() -> None:
    (words,) = search_section(search(), {}).paragraphs
    assert words.startswith("5 sets were measured; the one chosen has 4 points.")
    assert "has perplexity 30, the chosen one 24 (-20.0 %)" in words


def test_the_picture_shows_where_sets_came_from(tmp_path: Path) -> None:
    path = plot_search(search(), tmp_path / "search.png")
    # In both panels; the start also in the legend.
    assert all(pixels_of(path, colour) > 60 for colour in ("#4477AA", "#228833", "#EE6677", "#AA3377"))
    one = search() | {"history": search()["history"][:1]}
    assert pixels_of(plot_search(one, tmp_path / "one.png"), "#EE6677") == 0
    assert matplotlib.image.imread(path).shape[1] > matplotlib.image.imread(path).shape[0]


def test_ruined_sets_alone_cannot_be_drawn(tmp_path: Path) -> None:
    ruined = search() | {"history": search()["history"][1:2]}
    assert has_measurements(search())
    assert not has_measurements(ruined)
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_search(ruined, tmp_path / "search.png")
