"""Time-outs by kind of test, and an environment in which nothing is asked of the network.

The environment is set here, before any test module imports torch or transformers, and is inherited by every process a
test starts.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from filelock import FileLock

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "offline",
    "WANDB_SILENT": "true",
    "TOKENIZERS_PARALLELISM": "false",
}

#: Seconds for one test by its folder under tests/; the default is in pyproject.toml. A test's own mark wins.
TIMEOUTS = {"distributed": 400, "e2e": 1000, "serving": 1000}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        limit = TIMEOUTS.get(item.path.relative_to(here).parts[0])
        if limit is not None and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(limit))


class Prepared(NamedTuple):
    """A prepared model folder, and the processor seconds that it took."""

    folder: Path
    seconds: float


@pytest.fixture(scope="session")
def prepared_smollm2(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """SmolLM2-135M from its package, made once for all workers. Not to be written to."""
    from megatron_spd.checkpoint.prepare import prepare

    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folder, took = shared / "smollm2", shared / "smollm2.seconds"
    with FileLock(shared / "smollm2.lock"):
        if not took.is_file():
            start = time.process_time()
            prepare("smollm2-135m", folder)
            took.write_text(str(time.process_time() - start))
    return Prepared(folder, float(took.read_text()))


@pytest.fixture(scope="session")
def smollm2(prepared_smollm2: Prepared) -> Path:
    """The folder of SmolLM2-135M."""
    return prepared_smollm2.folder
