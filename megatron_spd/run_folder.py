"""The folder of one run: what it is, and the results of its finished stages."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_spd.errors import UserError
from megatron_spd.files import write_text_atomic
from megatron_spd.runtime.distributed import Runtime

#: Parts of a run's identity that say nothing to a reader, and what they stand for.
_HASHES = {"fingerprint": "model", "text": "text"}


#: Options that may differ when a run is continued: they do not change what is computed.
FREE_OPTIONS = frozenset(
    {
        "config",
        "json",
        "debug",
        "local_rank",
        "max_minutes",
        "tracking",
        "out",
        "ranks",
        "tensor_parallel",
    }
)


def run_identity(
    fingerprint: str, options: Any, texts: Iterable[Tensor], free: Iterable[str] = ()
) -> dict[str, Any]:
    """What a run is: the model, a hash of all pieces of text [n, s], and every option but :data:`FREE_OPTIONS` and
    ``free``."""
    left_out = FREE_OPTIONS | set(free)
    named = {k: v for k, v in dataclasses.asdict(options).items() if k not in left_out}
    text = hashlib.sha256(b"".join(t.numpy().tobytes() for t in texts)).hexdigest()
    return {"fingerprint": fingerprint, "text": text, **named}


class RunFolder:
    """The folder of one run. Raises UserError if it holds another run, or something that is not a run."""

    def __init__(self, folder: Path, identity: dict[str, Any], runtime: Runtime) -> None:
        self.folder, self.runtime = folder, runtime
        problem = runtime.from_main(self._claim(identity) if runtime.is_main else None)
        if problem:
            raise UserError(problem)

    def _claim(self, identity: dict[str, Any]) -> str | None:
        stamp = self.folder / "run.json"
        if stamp.is_file():
            try:
                held = dict(json.loads(stamp.read_text(encoding="utf-8")))
            except (ValueError, TypeError):
                return f"{stamp} is not the record of a run; give a new or empty folder as --out"
            different = [k for k in identity if held.get(k) != identity[k]]
            if different:
                return (
                    f"{self.folder} holds another run: {_difference(different[0], held, identity)}; "
                    "give another --out, or the same options to continue it"
                )
        elif self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            return f"{self.folder} exists and is not a run folder; give a new or empty folder as --out"
        (self.folder / "stages").mkdir(parents=True, exist_ok=True)
        self.write_json("run.json", identity)
        return None

    def write_json(self, name: str, content: Any) -> None:
        """Write a JSON file of the run atomically (main rank only)."""
        if self.runtime.is_main:
            write_text_atomic(self.folder / name, json.dumps(content, indent=1) + "\n")

    def stage(self, name: str, work: Callable[[], Any]) -> Any:
        """The JSON-able result of ``work()``, from the folder if the stage is finished. The same on every rank."""
        path = self.folder / "stages" / f"{name}.json"
        held = self.runtime.from_main(
            json.loads(path.read_text()) if self.runtime.is_main and path.is_file() else None
        )
        if held is not None:
            return held["result"]
        started = time.monotonic()
        # Through JSON, so that a resumed run sees exactly what the first one saw.
        result = json.loads(json.dumps(self.runtime.from_main(work())))
        self.write_json(f"stages/{name}.json", {"result": result, "seconds": time.monotonic() - started})
        return result

    def seconds(self) -> dict[str, float]:
        """Wall time of the finished stages in their order."""
        paths = sorted((self.folder / "stages").glob("*.json"), key=lambda p: p.stat().st_mtime_ns)
        return {p.stem: json.loads(p.read_text())["seconds"] for p in paths}


def _difference(key: str, held: dict[str, Any], wanted: dict[str, Any]) -> str:
    if key in _HASHES:
        return f"it was made from another {_HASHES[key]}"
    return f"its {key} is {held.get(key)!r}, this one's {wanted[key]!r}"
