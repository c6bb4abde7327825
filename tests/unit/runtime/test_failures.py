"""Which errors are the user's to mend."""

from __future__ import annotations

import errno

import pytest
from safetensors import SafetensorError

from megatron_spd.errors import PlanError, UserError
from megatron_spd.runtime.failures import as_user_error, one_line


def test_a_user_error_is_itself_also_as_the_cause() -> None:
    error = PlanError("plan field 'version'")
    assert as_user_error(error) is error
    wrapped = RuntimeError("while loading")
    wrapped.__cause__ = error
    assert as_user_error(wrapped) is error


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "out/model.safetensors"),
        OSError(errno.EDQUOT, "Disk quota exceeded", "out/model.safetensors"),
        # As safetensors 0.8 words it: no OSError, no errno.
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_the_users(error: Exception) -> None:
    found = as_user_error(error)
    assert isinstance(found, UserError)
    assert str(found).startswith("no space left on the device")
    assert ("out/model.safetensors" in str(found)) == isinstance(error, OSError)


def test_refused_access_is_the_users() -> None:
    found = as_user_error(PermissionError(errno.EACCES, "Permission denied", "/etc/shadow"))
    assert str(found) == "Permission denied at /etc/shadow; choose a path that this user may read and write"


@pytest.mark.parametrize(
    "error",
    [
        KeyError("lost"),
        FileNotFoundError(errno.ENOENT, "No such file", "x"),
        PermissionError(errno.EPERM, "signal"),
    ],
)
def test_anything_else_is_a_defect(error: Exception) -> None:
    assert as_user_error(error) is None


def test_a_suppressed_context_does_not_count() -> None:
    error = RuntimeError("unrelated")
    error.__context__ = UserError("handled before")
    assert as_user_error(error) is error.__context__
    error.__suppress_context__ = True
    assert as_user_error(error) is None


def test_one_line() -> None:
    assert one_line(ValueError("a\n  b")) == "a b"
    assert one_line(AssertionError()) == "AssertionError"
