"""All-reduces by size and format, between ranks. (Through the launcher, on a link: test_link.py.)"""

from __future__ import annotations

from typing import Any

from megatron_spd.config import CollectivesOptions
from megatron_spd.latency.messages import measure_messages
from megatron_spd.report.latency import messages_text
from megatron_spd.runtime.distributed import initialize
from tests.ranks import run_ranks


def measured() -> dict[str, Any]:
    options = CollectivesOptions(
        ranks=2, formats="int8,int4:g64", messages="1000,32k", dtype="bf16", repeats=2
    )
    return measure_messages(options, initialize(2))


def test_two_ranks() -> None:
    found = run_ranks(2, measured)[0]
    rows = found["rows"]
    assert [(row["bytes"], row["collective"]) for row in rows] == [
        (size, name) for size in (1000, 32768) for name in ("full", "int8", "int4:g64")
    ]
    full, eight, four = rows[3:]
    # Of two ranks each sends half of the tensor, and half of the sum; a group has ten bytes beside its codes.
    assert (full["sent"], full["ratio"]) == (32768, 1.0)
    assert eight["sent"] == 2 * 64 * (128 + 10)
    assert four["sent"] == 2 * 128 * (32 + 10)
    assert full["error"] < eight["error"] < four["error"] < 0.2
    assert all(0 < row["ratio_low"] <= row["ratio"] <= row["ratio_high"] for row in rows)
    head, *table = messages_text(found).splitlines()
    assert head == "2 ranks, gloo, bf16, 2 repeats"
    assert len(table) == 2 + len(rows)
