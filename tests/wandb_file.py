"""Reads back what W&B recorded offline."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

FILE_HEADER = b":W&B" + struct.pack("<HB", 0xBEE1, 0)
BLOCK, FULL, FIRST, LAST = 32768, 1, 2, 4


def messages(data: bytes) -> Iterator[bytes]:
    """The whole messages in a W&B file that may still grow.

    It is LevelDB's log format, which wandb writes but has no Python reader for: blocks of 32 KiB hold fragments
    with a header of checksum, length and kind (whole, first, middle, last).
    """
    assert data[:7] == FILE_HEADER[: len(data)]
    place, message = len(FILE_HEADER), b""
    while place + 7 <= len(data):
        if BLOCK - place % BLOCK < 7:
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        fragment = data[place + 7 : place + 7 + length]
        if len(fragment) < length:
            return
        place += 7 + length
        message = fragment if kind in (FULL, FIRST) else message + fragment
        if kind in (FULL, LAST):
            yield message


def read_offline_run(run_dir: Path) -> list[Any]:
    """Every record of the one offline run below ``run_dir``.

    W&B's service process may still be writing when ``finish`` returns; a finished run ends with an exit record.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = run_dir.glob("wandb/offline-run-*/run-*.wandb")
    give_up = time.monotonic() + 60
    while True:
        records = [Record.FromString(message) for message in messages(path.read_bytes())]
        if records and records[-1].HasField("exit"):
            return records
        assert time.monotonic() < give_up, "the run was never written to its end"
        time.sleep(0.05)


def merged(items: Iterable[Any]) -> dict[str, Any]:
    """key -> value of W&B's update items, later ones winning."""
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
