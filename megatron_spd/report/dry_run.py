"""The dry run as text."""

from __future__ import annotations

from typing import Any


def dry_run_text(result: dict[str, Any]) -> str:
    """What :func:`megatron_spd.scale.dry_run.dry_run` returned, as a table with its assumptions."""
    model, setup, assumed = result["model"], result["setup"], result["assumptions"]
    on_cpu = assumed["device_memory"] is None
    head = [
        f"{model['name']}: {model['parameters'] / 1e9:.2f} billion parameters, {_bytes(model['bytes'])} on disk",
        f"G = {setup['branches']}, M = {setup['ranks']}, {setup['replicas']} replica(s), {setup['nodes']} node(s), "
        f"{setup['dtype']}; recovery {setup['recovery']}, {setup['dropped']} points dropped in {setup['units']} units",
    ]
    if not model["supported"]:
        head.append(
            f"this version knows the sizes of {model['model_type']!r} models, but does not build them yet"
        )
    columns = ["stage", "device", "host", "tokens", "read", "written", "time (estimate)"]
    rows = [_row(stage, on_cpu) for stage in result["stages"]]
    rows.append(["total", "", "", "", *([""] * 2), _time(result["seconds"])])
    notes = ["", "memory: of one rank at the fullest moment of the stage; read, written: bytes of weights"]
    too_large = [name for name, fits in (result["fits"] or {}).items() if not fits]
    if too_large:
        limit = _bytes(assumed["device_memory"])
        notes.append(f"does not fit {assumed['hardware']} ({limit}): {', '.join(too_large)}")
    notes.append(
        f"times assume {assumed['tflops']:g} x 10^12 operations/s ({assumed['hardware']}) x {assumed['efficiency']:g}, "
        f"disk {assumed['disk_rate'] / 1e9:g} GB/s, all-reduces at {assumed['tensor_parallel_rate'] / 1e9:g} GB/s "
        f"among M ranks, {assumed['data_parallel_rate'] / 1e9:g} GB/s among replicas; nothing overlaps"
    )
    return "\n".join([*head, "", *_table([columns, *rows]), *notes])


def _row(stage: dict[str, Any], on_cpu: bool) -> list[str]:
    memory = stage["memory"]
    return [
        stage["stage"],
        "-" if on_cpu else _bytes(memory["device"]),
        _bytes(memory["host"]),
        f"{stage['tokens']:,}" if stage["tokens"] else "-",
        _bytes(stage["bytes_read"]),
        _bytes(stage["bytes_written"]) if stage["bytes_written"] else "-",
        _time(stage["seconds"]["total"]),
    ]


def _table(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _time(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.2g} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
