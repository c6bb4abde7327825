"""Measured sets of dropped sync points on disk, so that a killed search repeats no measurement."""

from __future__ import annotations

import json
import math
from pathlib import Path

from megatron_spd.errors import UserError
from megatron_spd.files import write_text_atomic


class MeasuredSets:
    """Perplexity by set of dropped points, written whole to ``path`` after every addition (None: kept in memory).

    ``identity`` names what was measured on: model, text, G, and whatever else decides a perplexity.

    Raises:
        UserError: the file at ``path`` holds measurements of another identity, or is not such a file.
    """

    def __init__(self, path: Path | None, identity: str) -> None:
        self.path, self.identity = path, identity
        self._perplexity: dict[tuple[int, ...], float] = {}
        if path is not None and path.exists():
            self._perplexity = self._read(path)

    def __len__(self) -> int:
        return len(self._perplexity)

    def get(self, points: tuple[int, ...]) -> float | None:
        """The perplexity with exactly ``points`` (ascending) dropped, None if it was not measured."""
        return self._perplexity.get(points)

    def add(self, points: tuple[int, ...], perplexity: float) -> None:
        """Keep a measurement. An infinite perplexity is written as null, which JSON has."""
        self._perplexity[points] = perplexity
        if self.path is not None:
            sets = [
                {"points": list(p), "perplexity": v if math.isfinite(v) else None}
                for p, v in self._perplexity.items()
            ]
            text = json.dumps({"identity": self.identity, "sets": sets})
            write_text_atomic(self.path, text)

    def _read(self, path: Path) -> dict[tuple[int, ...], float]:
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            identity = state["identity"]
            sets = {
                tuple(int(p) for p in entry["points"]): math.inf
                if entry["perplexity"] is None
                else float(entry["perplexity"])
                for entry in state["sets"]
            }
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} was expected to hold the measured sets of a search, but cannot be read ({error!r}); remove it"
            ) from error
        if identity != self.identity:
            raise UserError(
                f"{path} holds the measured sets of another search (another model, text or G); "
                "remove it, or write to another folder"
            )
        return sets
