"""A world of one for what sums over ranks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from megatron_spd.runtime.distributed import Runtime, initialize, shutdown


@pytest.fixture(scope="package")
def runtime() -> Iterator[Runtime]:
    yield initialize(1)
    shutdown()
