"""Folders that appear whole or not at all, and the small files that go along with weights."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from megatron_spd.errors import UserError

#: What a Hugging Face tokenizer may be made of.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
GENERATION_CONFIG = "generation_config.json"


@contextlib.contextmanager
def no_space_as_user_error(target: Path) -> Iterator[None]:
    """Turn "the disk is full" from Python or from safetensors into a one-line UserError that names ``target``."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error)
        if not full:
            raise
        raise UserError(
            f"no space left on the device while writing {target}; free some space or choose another folder"
        ) from None


def is_free(folder: Path) -> bool:
    """Whether ``folder`` does not exist yet or is an empty folder."""
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


@contextlib.contextmanager
def atomic_folder(out: Path, may_replace: Callable[[Path], bool] | None = None) -> Iterator[Path]:
    """A temporary folder beside ``out`` that is renamed to ``out`` when the body ends without an error.

    On an error, a full disk included, the temporary folder is removed and ``out`` is as it was. A killed process
    leaves ``<out>.partial``, which the next call for the same ``out`` clears away. Raises UserError where ``out`` is
    neither missing nor empty, unless ``may_replace(out)`` says that what lies there may go.
    """
    if not is_free(out) and not (may_replace is not None and may_replace(out)):
        raise UserError(
            f"output folder {out} already holds something else; choose another folder or remove it first"
        )
    partial, old = out.with_name(out.name + ".partial"), out.with_name(out.name + ".old")
    with no_space_as_user_error(out):
        for leftover in (partial, old):
            shutil.rmtree(leftover, ignore_errors=True)
        _make(partial)
        try:
            yield partial
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    if is_free(out):
        os.replace(partial, out)
    else:
        os.replace(out, old)
        os.replace(partial, out)
        shutil.rmtree(old)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True)
    except (PermissionError, FileExistsError, NotADirectoryError) as error:
        raise UserError(f"cannot make the folder {folder}: {error.strerror}; choose another folder") from None


def copy_side_files(source: Path, target: Path) -> None:
    """Copy the tokenizer and the generation config, as far as ``source`` has them."""
    for name in (*TOKENIZER_FILES, GENERATION_CONFIG):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
