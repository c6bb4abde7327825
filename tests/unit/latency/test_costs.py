"""What a sync point costs, against numbers worked out by hand."""

from __future__ import annotations

import pytest

from megatron_spd.latency.bounds import LinkSpeed
from megatron_spd.latency.costs import Serving, byte_costs

HIDDEN = 576  # SmolLM2-135M
#: 1 Gbit/s, a call takes 1 ms.
LINK = LinkSpeed(1e-3, 125e6)


def test_bytes_of_a_token() -> None:
    # int8: 128 codes and 10 bytes for each group; int4: 32 codes in 16 bytes, and 10; int4/int8: the mean.
    costs = byte_costs(HIDDEN, 4, ["int8", "int4", "int4/int8"])
    assert costs == pytest.approx(
        {
            "none": 0,
            "full": 2304,
            "int8": HIDDEN * 138 / 128,
            "int4": HIDDEN * 26 / 32,
            "int4/int8": HIDDEN * (26 / 32 + 138 / 128) / 2,
        }
    )
    assert byte_costs(HIDDEN, 2, [])["full"] == 1152


def test_time_of_a_prompt() -> None:
    costs = Serving(3, 128, LINK).costs(HIDDEN, 4, ["int8"])
    # A rank sends 2 * 2/3 of 128 * 576 * 4 = 294912 bytes in one call.
    assert costs["full"] == pytest.approx(1e-3 + 393216 / 125e6)
    # Chunks of 24576 values, 192 groups of 138 bytes; one to each of two others in both of two calls.
    assert costs["int8"] == pytest.approx(2e-3 + 4 * 26496 / 125e6)
    assert costs["none"] == 0


def test_small_messages_go_full() -> None:
    # Below 65536 bytes: 28 tokens are 64512, 29 are 66816.
    few, more = (Serving(3, n, LINK).costs(HIDDEN, 4, ["int8"]) for n in (28, 29))
    assert few["int8"] == few["full"] == pytest.approx(1e-3 + 64512 * 4 / 3 / 125e6)
    assert more["int8"] > 2e-3


def test_calls_for_free_leave_the_bytes() -> None:
    costs = Serving(2, 1024, LinkSpeed(0.0, 125e6)).costs(HIDDEN, 2, ["int8", "int4"])
    assert costs["full"] == pytest.approx(1024 * HIDDEN * 2 / 125e6)
    # Messages are whole groups here, so that bytes for each value are all there is.
    assert costs["int8"] / costs["full"] == pytest.approx(138 / 128 / 2)
    assert costs["int4"] / costs["full"] == pytest.approx(26 / 32 / 2)
