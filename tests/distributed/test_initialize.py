"""Groups of ranks made anew with other sizes, as one process does that runs several layouts in turn."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_spd.runtime.distributed import initialize
from tests.distributed.test_training import LIMIT, Form, train_form
from tests.models import make_export, make_llama
from tests.ranks import run_ranks

#: Pipeline stages, and the optimizer that slices parameters: what has kept models, and so groups, alive.
FORMS = (Form(tensor=1, distributed_optimizer=True), Form(tensor=1, pipeline=2, ends=(0,)))


def threads_after_each(folder: Path, out: Path, rounds: int) -> list[int]:
    """Threads of this process after every round of training in all forms."""
    counts = []
    for number in range(rounds):
        for form in FORMS:
            train_form(folder, out / f"{number}-{form.pipeline}", form)
        initialize(2)
        counts.append(len(os.listdir("/proc/self/task")))
    return counts


@pytest.mark.timeout(LIMIT + 60)
def test_old_groups_end_with_their_models(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base", layers=2)
    export = make_export(base, tmp_path / "spd", 2, [0])
    for counts in run_ranks(2, threads_after_each, export, tmp_path, 3, timeout=LIMIT):
        assert counts[1] == counts[2], counts
