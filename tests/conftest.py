"""Time-outs by kind of test, and an environment in which nothing is asked of the network.

The environment is set here, before any test module imports torch or transformers, and is inherited by every process a
test starts.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "offline",
    "WANDB_SILENT": "true",
    "TOKENIZERS_PARALLELISM": "false",
}

#: Seconds for one test by its folder under tests/; the default is in pyproject.toml. A test's own mark wins.
TIMEOUTS = {"distributed": 240, "e2e": 600, "serving": 800}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        limit = TIMEOUTS.get(item.path.relative_to(here).parts[0])
        if limit is not None and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(limit))
