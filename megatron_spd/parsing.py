"""Flags, and a ``--config`` file below them, into the options of a command.

``--drop-ratio``, ``--drop_ratio`` and the YAML or JSON key ``drop_ratio`` (or ``drop-ratio``) are one option. A flag
overrides the file.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

import yaml

from megatron_spd.errors import UserError
from megatron_spd.options import CommonOptions, flag

_Options = TypeVar("_Options", bound=CommonOptions)


def parse_options(kind: type[_Options], argv: Sequence[str], prog: str) -> _Options:
    """The options of class ``kind`` from flags and, below them, from the file named by ``--config``.

    Raises UserError naming the flag or key that is unknown, missing, of a wrong kind or out of bounds.
    """
    # Here, not above: half a second that `--version` and a wrong command name need not wait for.
    from transformers import HfArgumentParser

    class Parser(HfArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise UserError(f"{message}; see `{prog} --help`")

    parser = Parser(
        cast(Any, kind),
        prog=prog,
        description=(kind.__doc__ or "").splitlines()[0],
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    file = _config_file(argv, kind.file_flag)
    defaults = [] if file is None else _file_flags(kind, file)
    options, unknown = parser.parse_args_into_dataclasses(
        _without_percent_signs([*defaults, *argv]), return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        name = unknown[0].split("=")[0].removeprefix("--").replace("-", "_")
        raise UserError(f"unknown option {unknown[0]!r}; {_did_you_mean(name, _names(kind), flag)}")
    return cast(_Options, options)


def _without_percent_signs(flags: Sequence[str]) -> list[str]:
    """``--max-perplexity-increase 2%`` means 2."""
    plain, name = list(flags), flag("max_perplexity_increase")
    for i, given in enumerate(plain):
        if given.startswith(f"{name}=") or (i and plain[i - 1] == name):
            plain[i] = given.removesuffix("%")
    return plain


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default where there is one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def _names(kind: type[CommonOptions]) -> list[str]:
    return sorted({f.name for f in dataclasses.fields(kind)} - {"local_rank"})


def _did_you_mean(name: str, known: Sequence[str], spelling: Callable[[str], str]) -> str:
    near = difflib.get_close_matches(name, known, 1)
    return f"did you mean {spelling(near[0])}?" if near else f"known are {', '.join(map(spelling, known))}"


def _config_file(argv: Sequence[str], name: str) -> Path | None:
    """The last value of the flag ``name`` in ``argv``; the parser itself complains about one without a value."""
    file = None
    for here, following in zip(argv, [*argv[1:], None], strict=True):
        if here == name and following is not None:
            file = Path(following)
        elif here.startswith(f"{name}="):
            file = Path(here.removeprefix(f"{name}="))
    return file


def _file_flags(kind: type[CommonOptions], path: Path) -> list[str]:
    """The content of a config file as flags, so that one parser checks both."""
    names = [name for name in _names(kind) if flag(name) not in ("--config", kind.file_flag)]
    aliases = {a.lstrip("-"): f.name for f in dataclasses.fields(kind) for a in f.metadata.get("aliases", ())}
    flags = []
    for key, value in _read_config(path).items():
        name = aliases.get(str(key), str(key).replace("-", "_"))
        if name not in names:
            raise UserError(f"{path}: unknown key {key!r}; {_did_you_mean(name, names, str)}")
        if isinstance(value, (list, dict)):
            raise UserError(f"{path}: key {key!r} is {type(value).__name__}, expected a single value")
        if value is not None:
            flags.append(f"{flag(name)}={value}")
    return flags


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"no config file at {path}; give a YAML or JSON file")
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (UnicodeDecodeError, json.JSONDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} is neither YAML nor JSON: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {type(content).__name__}, expected option names with values")
    return content
