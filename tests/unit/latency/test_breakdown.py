"""Compute, communication and wait from the times that ranks spend in collectives."""

from __future__ import annotations

import pytest

from megatron_spd.latency.breakdown import (
    Breakdown,
    Parts,
    RankTimes,
    TimedCall,
    as_json,
    break_down,
    median_breakdown,
)


def times(in_collectives: list[float], blocks: list[float], total: float) -> RankTimes:
    """A rank with one all-reduce in each of two blocks, and one in front of them."""
    places = (None, 0, 1)
    calls = [TimedCall("all_reduce", place, 8, 2, s) for place, s in zip(places, in_collectives, strict=True)]
    return RankTimes(calls, blocks, total)


def test_the_last_rank_to_enter_does_not_wait() -> None:
    early = times([1.0, 5.0, 2.0], [7.0, 4.0], 14.0)
    late = times([1.0, 1.0, 4.0], [7.0, 4.0], 14.0)
    found = break_down([early, late])
    # Block 0: the second rank comes 4 later; block 1: the first one comes 2 later.
    assert found.blocks == [Parts(compute=4.0, communication=1.0, wait=2.0), Parts(1.0, 2.0, 1.0)]
    assert found.outside == Parts(compute=2.0, communication=1.0, wait=0.0)
    assert found.total == Parts(7.0, 4.0, 3.0)
    assert found.total.total == 14.0


def test_groups_of_ranks_wait_for_their_own() -> None:
    spent = [[1.0, 3.0], [5.0, 9.0]]
    ranks = [RankTimes([TimedCall("all_reduce", 0, 8, 2, s)], [10.0], 10.0) for pair in spent for s in pair]
    # The last ranks of the two groups spend 1 and 5.
    assert break_down(ranks).blocks == [Parts(compute=5.5, communication=3.0, wait=1.5)]


def test_ranks_that_called_other_collectives_are_not_compared() -> None:
    one = times([1.0, 1.0, 1.0], [2.0, 2.0], 6.0)
    other = RankTimes(one.calls[:2], one.blocks, one.total)
    with pytest.raises(RuntimeError, match="different collectives"):
        break_down([one, other])


def test_median_of_passes_figure_by_figure() -> None:
    passes = [Breakdown([Parts(a, 1.0, a)], Parts(0.0, a, 0.0)) for a in (3.0, 1.0, 2.0)]
    found = median_breakdown(passes)
    assert found == Breakdown([Parts(2.0, 1.0, 2.0)], Parts(0.0, 2.0, 0.0))
    assert as_json(found)["blocks"] == {"compute": [2.0], "communication": [1.0], "wait": [2.0]}
