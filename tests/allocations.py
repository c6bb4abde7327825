"""What PyTorch's allocator holds on the CPU: the peak over a piece of code, of what is allocated inside it."""

from __future__ import annotations

import gc
import json
import tempfile
from collections.abc import Callable
from typing import Any

import torch


def peak_bytes(work: Callable[[], Any]) -> int:
    """The most bytes that tensors made by ``work()`` held at any one time, temporaries included."""
    gc.collect()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        work()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profile.export_chrome_trace(file.name)
        with open(file.name, encoding="utf-8") as stream:
            events = json.load(stream)["traceEvents"]
    changes = sorted(((e["ts"], e["args"]) for e in events if e["name"] == "[memory]"), key=lambda c: c[0])
    held: dict[int, int] = {}
    total = peak = 0
    for _, change in changes:
        address, size = change["Addr"], change["Bytes"]
        if size > 0:
            held[address] = size
            total += size
        else:
            # What was allocated before is not ours.
            total -= held.pop(address, 0)
        peak = max(peak, total)
    return peak
