"""Measured sets of sync points on disk, so that a killed search repeats no measurement.

One file for each search: its identity, and a list of sets with their figures, written whole after every addition.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from megatron_spd.errors import UserError
from megatron_spd.files import write_text_atomic

#: What runs at each of the 2L sync points, as in a plan: "none", "full" or a low-bit format.
Collectives = tuple[str, ...]

_Sets = TypeVar("_Sets")


class MeasuredSets:
    """Perplexity by set of dropped points, kept in the file ``path`` (None: in memory).

    ``identity`` names what was measured on: model, text, G, and whatever else decides a perplexity.

    Raises:
        UserError: the file at ``path`` holds measurements of another identity, or is not such a file.
    """

    def __init__(self, path: Path | None, identity: str) -> None:
        self.path, self.identity = path, identity
        self._perplexity = _read(path, identity, self._decoded) or {}

    def __len__(self) -> int:
        return len(self._perplexity)

    def get(self, points: tuple[int, ...]) -> float | None:
        """The perplexity with exactly ``points`` (ascending) dropped, None if it was not measured."""
        return self._perplexity.get(points)

    def add(self, points: tuple[int, ...], perplexity: float) -> None:
        """Keep a measurement."""
        self._perplexity[points] = perplexity
        sets = [{"points": list(p), "perplexity": _to_json(v)} for p, v in self._perplexity.items()]
        _write(self.path, self.identity, sets)

    @staticmethod
    def _decoded(sets: list[dict[str, Any]]) -> dict[tuple[int, ...], float]:
        return {tuple(int(p) for p in entry["points"]): _from_json(entry["perplexity"]) for entry in sets}


class MeasuredCollectives:
    """Two figures by what runs at the sync points, likewise: what the divergence from the plain model stands for, and
    the perplexity itself (see ``measure.py``)."""

    def __init__(self, path: Path | None, identity: str) -> None:
        self.path, self.identity = path, identity
        self._figures = _read(path, identity, self._decoded) or {}

    def get(self, collectives: Collectives) -> tuple[float, float] | None:
        """The figures with exactly ``collectives`` at the points, None if they were not measured."""
        return self._figures.get(collectives)

    def add(self, collectives: Collectives, figures: tuple[float, float]) -> None:
        """Keep a measurement."""
        self._figures[collectives] = figures
        sets = [
            {"sync_points": list(c), "equivalent": _to_json(e), "perplexity": _to_json(p)}
            for c, (e, p) in self._figures.items()
        ]
        _write(self.path, self.identity, sets)

    @staticmethod
    def _decoded(sets: list[dict[str, Any]]) -> dict[Collectives, tuple[float, float]]:
        return {
            tuple(str(c) for c in entry["sync_points"]): (
                _from_json(entry["equivalent"]),
                _from_json(entry["perplexity"]),
            )
            for entry in sets
        }


def _to_json(perplexity: float) -> float | None:
    """An infinite perplexity is null, which JSON has."""
    return perplexity if math.isfinite(perplexity) else None


def _from_json(value: Any) -> float:
    return math.inf if value is None else float(value)


def _write(path: Path | None, identity: str, sets: list[dict[str, Any]]) -> None:
    if path is not None:
        write_text_atomic(path, json.dumps({"identity": identity, "sets": sets}))


def _read(path: Path | None, identity: str, decoded: Callable[[list[dict[str, Any]]], _Sets]) -> _Sets | None:
    """The sets at ``path``, None where there is no file."""
    if path is None or not path.exists():
        return None
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        held, sets = state["identity"], decoded(state["sets"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} was expected to hold the measured sets of a search, but cannot be read ({error!r}); remove it"
        ) from error
    if held != identity:
        raise UserError(
            f"{path} holds the measured sets of another search (another model, text or G); "
            "remove it, or write to another folder"
        )
    return sets
