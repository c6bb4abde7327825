"""What the ranks are given before they start."""

from __future__ import annotations

import os
import socket

import pytest
import torch

from megatron_spd.runtime.launch import free_port, rank_environment


def test_cores_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert rank_environment(3)["OMP_NUM_THREADS"] == "2"
    assert rank_environment(9)["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize(("devices", "accelerator"), [(0, "cpu"), (2, "cpu"), (3, None), (8, None)])
def test_ranks_run_on_the_cpu_where_devices_are_too_few(
    monkeypatch: pytest.MonkeyPatch, devices: int, accelerator: str | None
) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    assert rank_environment(3).get("DS_ACCELERATOR") == accelerator


def test_what_the_user_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    monkeypatch.setenv("DS_ACCELERATOR", "xpu")
    env = rank_environment(2)
    assert (env["OMP_NUM_THREADS"], env["DS_ACCELERATOR"]) == ("5", "xpu")


def test_free_port_passes_over_a_port_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        used = held.getsockname()[1]
        other = free_port()
        monkeypatch.setattr("random.SystemRandom.sample", lambda *_: [used, other])
        assert free_port() == other
