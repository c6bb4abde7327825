"""Medians, quartiles, and what less communication should save."""

from __future__ import annotations

import pytest

from megatron_spd.latency.bounds import LinkSpeed, Spread, bytes_sent, saving


def test_spread_of_several_values_and_of_one() -> None:
    assert Spread.of([5.0, 1.0, 3.0, 2.0, 4.0]) == Spread(median=3.0, low=2.0, high=4.0)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)
    with pytest.raises(ValueError, match="no values"):
        Spread.of([])


@pytest.mark.parametrize(
    ("collective", "ranks", "sent"),
    [
        ("all_reduce", 2, 600),  # one half to the other rank, and the sum of the other half
        ("all_reduce", 3, 800),
        ("all_to_all_single", 3, 400),
        ("all_gather_into_tensor", 3, 1200),  # both other ranks need all of it
        ("reduce_scatter_tensor", 3, 400),
        ("all_reduce", 1, 0),
    ],
)
def test_bytes_that_a_rank_sends(collective: str, ranks: int, sent: float) -> None:
    assert bytes_sent(collective, 600, ranks) == pytest.approx(sent)


def test_link_speed_adds_calls_and_bytes() -> None:
    link = LinkSpeed(seconds_per_call=0.001, bytes_per_second=1e6, nominal=2e6)
    assert link.seconds(3, 5e5) == pytest.approx(0.503)
    assert link.least_seconds(5e5) == pytest.approx(0.25)
    assert LinkSpeed(0.001, 1e6).least_seconds(5e5) == pytest.approx(0.5)
    assert LinkSpeed(0.0, None).seconds(3, 5e5) == 0.0


def test_saving_compares_runs_of_the_same_round() -> None:
    # A machine that gets slower for both sides does not spread the saving.
    plain, other = [1.0, 2.0, 3.0], [0.75, 1.75, 2.75]
    saved = saving(plain, other, calls_saved=10, sent_saved=1e5, link=LinkSpeed(0.01, 1e6, 2e6))
    assert saved.measured == Spread(0.25, 0.25, 0.25)
    assert (saved.predicted, saved.bound) == (pytest.approx(0.2), pytest.approx(0.05))
    assert saved.of_predicted == pytest.approx(1.25)
    assert saved.change.median == pytest.approx(-0.125)


def test_no_share_of_a_saving_that_is_not_predicted() -> None:
    assert saving([1.0], [1.0], 0, 0.0, LinkSpeed(0.01, 1e6)).of_predicted is None


def test_what_is_sent_inside_branches_is_taken_off_the_prediction() -> None:
    link = LinkSpeed(0.01, 1e6)
    found = saving([1.0], [0.9], calls_saved=10, sent_saved=1e5, link=link, seconds_inside=0.05)
    assert found.predicted == pytest.approx(10 * 0.01 + 0.1 - 0.05)
