"""The pictures: drawn for every kind of result, whole files only, and showing the data they were given."""

from __future__ import annotations

import matplotlib.image
import pytest

from megatron_spd.report import plots
from megatron_spd.report.style import PALETTE
from megatron_spd.sensitivity.tiers import Thresholds
from tests.unit.report.pixels import pixels_of
from tests.unit.report.results import low_bit, results, sensitivity


@pytest.mark.parametrize("missing", [None, "algorithm1", "single"])
def test_sensitivity_is_drawn_in_the_colours_of_its_tiers(tmp_path, missing):
    measured = sensitivity() | ({missing: None} if missing else {})
    path = plots.plot_sensitivity(measured, Thresholds(0.05, 10.0), tmp_path / "s.png", [2, 5])
    assert [p.name for p in tmp_path.iterdir()] == ["s.png"]
    assert all(pixels_of(path, colour) > 200 for colour in plots.TIER_COLOURS.values())


def test_low_bit_points_have_a_row_of_their_own(tmp_path):
    without = plots.plot_sensitivity(sensitivity(), None, tmp_path / "a.png")
    measured = sensitivity() | {"low_bit": low_bit()}
    path = plots.plot_sensitivity(measured, None, tmp_path / "b.png")
    assert matplotlib.image.imread(path).shape[0] > 1.3 * matplotlib.image.imread(without).shape[0]
    for colour in PALETTE[1:3]:
        assert pixels_of(path, colour) > 100
        assert pixels_of(without, colour) == 0


def test_thresholds_move_the_colours(tmp_path):
    measured = sensitivity()
    low = plots.plot_sensitivity(measured, Thresholds(-1.0, 0.0), tmp_path / "low.png")
    high = plots.plot_sensitivity(measured, Thresholds(100.0, 200.0), tmp_path / "high.png")
    red, blue = plots.TIER_COLOURS["ESB"], plots.TIER_COLOURS["ISB"]
    assert pixels_of(low, red) > 10 * pixels_of(high, red)
    assert pixels_of(high, blue) > 10 * pixels_of(low, blue)


def test_more_blocks_make_a_wider_picture_and_thresholds_are_found(tmp_path):
    rows = [{"point": p, "block": p // 2, "perplexity": 20.0, "sensitivity": 0.01 * p**3} for p in range(159)]
    wide = plots.plot_sensitivity({"single": rows}, None, tmp_path / "wide.png")
    narrow = plots.plot_sensitivity({"single": rows[:11]}, None, tmp_path / "narrow.png")
    assert matplotlib.image.imread(wide).shape[1] > 1.5 * matplotlib.image.imread(narrow).shape[1]
    assert all(pixels_of(narrow, colour) > 200 for colour in plots.TIER_COLOURS.values())


def test_losses(tmp_path):
    units = results()["units"]
    path = plots.plot_losses(units, tmp_path / "losses.png")
    assert pixels_of(path, plots.TIER_COLOURS["SB"]) > 20
    assert pixels_of(path, plots.TIER_COLOURS["ISB"]) > 20
    # Without "before" and "after" only the legend has their colours.
    bare = [{"blocks": u["blocks"], "losses": u["losses"]} for u in units]
    without = plots.plot_losses(bare, tmp_path / "bare.png")
    assert pixels_of(without, plots.TIER_COLOURS["SB"]) < pixels_of(path, plots.TIER_COLOURS["SB"])


def test_perplexity_bars(tmp_path):
    both = plots.plot_perplexity({"plain": 20.0, "zero_shot": 30.0, "final": 22.0}, tmp_path / "both.png")
    zero_shot = plots.plot_perplexity({"plain": 20.0, "zero_shot": 496.0, "final": None}, tmp_path / "zs.png")
    assert pixels_of(both, plots.TIER_COLOURS["ISB"]) > 1000
    assert pixels_of(zero_shot, plots.TIER_COLOURS["ISB"]) == 0
    assert pixels_of(zero_shot, plots.TIER_COLOURS["SB"]) > 1000


def test_intervals_make_room_above_the_bars(tmp_path):
    values = {"plain": 20.0, "grouped": 22.0}
    bare = plots.plot_perplexity(values, tmp_path / "bare.png")
    barred = plots.plot_perplexity(
        values, tmp_path / "i.png", {"plain": [10.0, 40.0], "grouped": [None, None]}
    )
    # The bars are the same, the axis reaches twice as high.
    assert 0.4 < pixels_of(barred, "#66CCEE") / pixels_of(bare, "#66CCEE") < 0.7


def test_nothing_to_draw(tmp_path):
    with pytest.raises(ValueError, match="nothing to draw"):
        plots.plot_sensitivity({"algorithm1": None, "single": []}, None, tmp_path / "s.png")
    with pytest.raises(ValueError, match="nothing to draw"):
        plots.plot_losses([{"blocks": [1], "losses": []}], tmp_path / "l.png")
    assert list(tmp_path.iterdir()) == []
