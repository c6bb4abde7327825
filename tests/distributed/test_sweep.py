"""The sweep against measuring every candidate by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_spd.checkpoint.hf import CheckpointReader
from megatron_spd.evaluate.perplexity import plan_perplexity
from megatron_spd.plan import SPDPlan
from megatron_spd.runtime.distributed import initialize
from megatron_spd.sensitivity.sweep import sweep
from megatron_spd.stages import make_streamer
from tests.models import make_llama
from tests.ranks import run_ranks

BRANCHES = 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("m") / "m", layers=4)


def tokens() -> Tensor:
    return torch.randint(3, 300, (5, 24), generator=torch.Generator().manual_seed(1))


def swept(folder: Path, ranks: int, method: str, which: str) -> dict[str, Any]:
    streamer = make_streamer(CheckpointReader(folder), initialize(ranks), micro_batch=2)
    return sweep(streamer, tokens(), BRANCHES, method, which)  # type: ignore[arg-type]


def perplexities(folder: Path, drops: list[list[int]]) -> list[float]:
    reader = CheckpointReader(folder)
    streamer = make_streamer(reader, initialize(1))
    plan = SPDPlan.dense(reader.base_model(), BRANCHES)
    return [plan_perplexity(streamer, plan.with_drops(d), tokens())[0] for d in drops]


@pytest.mark.parametrize("ranks", [1, 2])
def test_every_candidate_is_as_measured_by_itself(model: Path, ranks: int) -> None:
    result = run_ranks(ranks, swept, model, ranks, "both", "any")[0]
    # Algorithm 1: attention points of blocks i..3 dropped.
    alone = run_ranks(1, perplexities, model, [[]] + [[2 * b for b in range(i, 4)] for i in range(4)])[0]
    plain, consecutive = alone[0], alone[1:]
    assert result["plain_perplexity"] == pytest.approx(plain, rel=1e-5)
    assert [e["perplexity"] for e in result["algorithm1"]] == pytest.approx(consecutive, rel=1e-5)
    following = [*consecutive[1:], plain]
    wanted = [p - q for p, q in zip(consecutive, following, strict=True)]
    assert [e["sensitivity"] for e in result["algorithm1"]] == pytest.approx(wanted, abs=1e-4 * plain)
    # Single points; the last MLP point cannot be dropped.
    assert [e["point"] for e in result["single"]] == list(range(7))
    single = run_ranks(1, perplexities, model, [[p] for p in range(7)])[0]
    assert [e["perplexity"] for e in result["single"]] == pytest.approx(single, rel=1e-5)
    assert [e["sensitivity"] for e in result["single"]] == pytest.approx(
        [p - plain for p in single], abs=1e-4 * plain
    )


@pytest.mark.parametrize(("which", "points"), [("attention", [0, 2, 4, 6]), ("mlp", [1, 3, 5])])
def test_only_the_asked_points_are_measured(model: Path, which: str, points: list[int]) -> None:
    result = run_ranks(1, swept, model, 1, "single", which)[0]
    assert [e["point"] for e in result["single"]] == points
    assert result["algorithm1"] is None


def test_perplexity_is_that_of_transformers(model: Path) -> None:
    reference = AutoModelForCausalLM.from_pretrained(model).eval()
    with torch.no_grad():
        losses = [reference(t[None], labels=t[None]).loss for t in tokens()]
    wanted = torch.stack(losses).double().mean().exp()
    assert run_ranks(2, swept, model, 2, "single", "attention")[1]["plain_perplexity"] == pytest.approx(
        float(wanted), rel=1e-5
    )
