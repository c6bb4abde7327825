"""The finishing pass in words and as a picture."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_spd.report.finishing import finishing_section, plot_finish
from tests.unit.report.pixels import pixels_of
from tests.unit.report.results import finish


def test_in_words() -> None:
    (words,) = finishing_section(finish(), {}).paragraphs
    assert words == (
        "All parameters of blocks 1-4, 5 steps. Held-out KL divergence from the plain model: 0.25 before, 0.1 nats per "
        "token after (-60.0 %); the state after step 4 was kept."
    )
    vectors = finish() | {"which": "vectors", "kept": False, "kl_after": 0.25, "best_step": 0}
    (words,) = finishing_section(vectors, {}).paragraphs
    assert words.startswith("Norms and shifts of blocks 1-4")
    assert words.endswith("(+0.0 %); nothing was kept.")


def test_a_plan_without_drops_has_nothing_to_finish() -> None:
    empty = {"blocks": [], "which": "blocks", "kept": False, "losses": [], "held_out": []}
    assert finishing_section(empty, {}).paragraphs == ["Nothing is dropped; there was nothing to train."]


def test_the_kept_state_is_marked(tmp_path: Path) -> None:
    kept = plot_finish(finish(), tmp_path / "kept.png")
    dropped = plot_finish(finish() | {"kept": False}, tmp_path / "dropped.png")
    assert pixels_of(kept, "#EE6677") > 100
    assert pixels_of(dropped, "#EE6677") == 0
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_finish(finish() | {"losses": []}, tmp_path / "none.png")
