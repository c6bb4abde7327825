"""Where links cannot be shaped, one line says why. (That they can is tested in tests/distributed/test_link.py.)"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_spd.errors import UserError
from megatron_spd.latency.link import check_links_possible
from megatron_spd.runtime.rank_status import STATUS_DIR


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the whole PATH, with `ip` and `tc` in it; root, under our own launcher."""
    for name in ("ip", "tc"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv(STATUS_DIR, str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    return tmp_path


def test_nothing_is_wrong_with_root_tools_and_launcher(tools: Path) -> None:
    check_links_possible()


def test_only_root_may(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(UserError, match="only root may"):
        check_links_possible()


def test_the_missing_tool_is_named(tools: Path) -> None:
    (tools / "tc").unlink()
    with pytest.raises(UserError, match="needs `tc`; install iproute2"):
        check_links_possible()


def test_ranks_of_another_launcher_are_refused(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(STATUS_DIR)
    with pytest.raises(UserError, match="no other launcher"):
        check_links_possible()
