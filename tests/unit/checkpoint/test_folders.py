"""Folders that appear whole or not at all."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from megatron_spd.checkpoint.folders import atomic_folder, no_space_as_user_error
from megatron_spd.errors import UserError


def test_appears_whole(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with atomic_folder(out) as folder:
        (folder / "file").write_text("x")
        assert not out.exists()
    assert [file.name for file in out.parent.iterdir()] == ["out"]
    assert (out / "file").read_text() == "x"


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with atomic_folder(tmp_path / "out") as folder:
            (folder / "file").write_text("x")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_cleared(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "half").write_text("x")
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("x")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["file"]
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def enter(out: Path) -> None:
    with atomic_folder(out):
        pass


def test_other_content_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("x")
    with pytest.raises(UserError, match="already holds something else"):
        enter(tmp_path)
    with pytest.raises(UserError, match="already holds something else"):
        enter(tmp_path / "precious")
    assert [file.name for file in tmp_path.iterdir()] == ["precious"]


def test_replaces_what_may_go_only_at_the_end(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("x")
    with atomic_folder(out, may_replace=lambda found: (found / "old").exists()) as folder:
        (folder / "new").write_text("x")
        assert (out / "old").exists()
    assert [file.name for file in out.iterdir()] == ["new"]
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot make the folder"):
        enter(tmp_path / "file" / "out")


def test_only_a_full_disk_is_translated(tmp_path: Path) -> None:
    def fail(number: int) -> None:
        with no_space_as_user_error(tmp_path):
            raise OSError(number, "reason")

    with pytest.raises(UserError, match="no space left"):
        fail(errno.ENOSPC)
    with pytest.raises(OSError, match="reason"):
        fail(errno.EIO)
