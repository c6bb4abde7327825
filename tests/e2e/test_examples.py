"""The recipes under examples/, on the real model with little text."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks import stop_pools

EXAMPLES = Path(__file__).parents[2] / "examples"
LITTLE = (
    "--sequences 1 --seq-length 64 --calibration-sequences 8 --search-budget 2 --distill-sequences 4 "
    "--finish-sequences 8 --eval-sequences 4 --epochs 1 --micro-batch-size 1"
)


@pytest.mark.slow
@pytest.mark.timeout(1600)
def test_smollm2(smollm2: Path, tmp_path: Path) -> None:
    # Three ranks with all of the model's optimizer state need the memory.
    stop_pools()
    (tmp_path / "model").symlink_to(smollm2)  # as a former start of the recipe would have left it
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = ["bash", str(EXAMPLES / "smollm2-135m" / "run.sh"), str(tmp_path), *LITTLE.split()]
    # All attention points but two, so that sensitive blocks are distilled too.
    command += ["--sync-points", "attention", "--drop-ratio", "0.93", "--tracking", "none", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert len(result["dropped"]) == 28
    assert result["all_reduces_per_token"] == {"before": 60, "after": 32}
    assert result["bytes_per_token"] == {"before": 60 * 576 * 4, "after": 32 * 576 * 4}
    perplexity = result["perplexity"]
    assert perplexity["plain"] < perplexity["final"] < perplexity["zero_shot"]
    assert perplexity["grouped"] < perplexity["zero_shot"]
    assert result["finish"]["kl_after"] < result["finish"]["kl_before"]
    assert result["samples"]["spd"].strip()
    drawn = ("sensitivity", "search", "guard", "perplexity", "losses", "finish")
    for name in ("report.html", "report.md", *(f"{name}.png" for name in drawn)):
        assert (tmp_path / "run" / "report" / name).stat().st_size > 1000
