"""Progress bars with time left, on the main rank's standard error only."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm

from megatron_spd.runtime.distributed import Runtime


def progress_bar(runtime: Runtime, what: str, total: int, unit: str) -> Any:
    """A tqdm bar of ``total`` ``unit`` s; silent on all ranks but the main one."""
    return tqdm(
        total=total, desc=what, unit=unit, disable=not runtime.is_main, mininterval=1.0, dynamic_ncols=True
    )
