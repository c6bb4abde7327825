"""Which failures of other packages and of the machine are the user's to mend."""

from __future__ import annotations

import errno

from megatron_spd.errors import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)
#: How libraries that are not written in Python word a full disk (safetensors: "os error 28").
_FULL_WORDS = ("no space left on device", "os error 28", "storagefull", "disk quota exceeded")


def as_user_error(error: BaseException) -> UserError | None:
    """The UserError that ``error`` amounts to, or None for a defect of ours.

    A UserError is returned as it is. A full disk (also as worded by compiled libraries, also as the cause of another
    exception) and a refused file access become one line that says what to do.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError):
            return cause
        if _is_full_disk(cause):
            return UserError(
                f"no space left on the device{_place(cause)}; free some space or write elsewhere, then run the same "
                "command again"
            )
        if isinstance(cause, OSError) and cause.errno in _REFUSED and cause.filename is not None:
            return UserError(
                f"{cause.strerror}{_place(cause)}; choose a path that this user may read and write"
            )
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return None


def one_line(error: BaseException) -> str:
    """The message of ``error`` on one line; its type if it has no message."""
    return " ".join(str(error).split()) or type(error).__name__


def _is_full_disk(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno in _FULL
    return any(words in str(error).lower() for words in _FULL_WORDS)


def _place(error: BaseException) -> str:
    filename = getattr(error, "filename", None)
    return f" at {filename}" if filename else ""
