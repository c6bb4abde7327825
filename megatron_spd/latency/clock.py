"""Marks in time that work for a CPU and for a device that computes behind the program's back."""

from __future__ import annotations

import time
from typing import Any, Protocol

import torch


class Clock(Protocol):
    """Marks are cheap to take; what lies between two of them is known after :meth:`finish`."""

    def mark(self) -> Any:
        """This moment, as seen by the stream of work."""

    def seconds(self, start: Any, end: Any) -> float:
        """Time from mark ``start`` to mark ``end``; only after :meth:`finish`."""

    def finish(self) -> None:
        """Wait until all work is done."""


class WallClock:
    """For the CPU: work is done when its call returns."""

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        return end - start

    def finish(self) -> None:
        pass


class DeviceClock:
    """For CUDA: marks are events in the current stream, which waits for NCCL's own stream after a collective."""

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return start.elapsed_time(end) / 1000

    def finish(self) -> None:
        torch.cuda.synchronize()


def clock_for(device: torch.device) -> Clock:
    """The clock of what runs on ``device``."""
    return DeviceClock() if device.type == "cuda" else WallClock()
