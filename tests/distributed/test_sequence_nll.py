"""Scores sequence by sequence: every rank knows all of them, whatever the number of ranks and the micro-batches."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_spd.checkpoint.hf import CheckpointReader
from megatron_spd.evaluate.perplexity import plan_nll, plan_perplexity
from megatron_spd.plan import SPDPlan
from megatron_spd.runtime.distributed import initialize
from megatron_spd.stages import make_streamer
from tests.models import make_llama
from tests.ranks import run_ranks


def tokens() -> Tensor:
    return torch.randint(3, 300, (5, 24), generator=torch.Generator().manual_seed(1))


def scored(folder: Path, ranks: int) -> tuple[list[float], float, int]:
    reader = CheckpointReader(folder)
    streamer = make_streamer(reader, initialize(ranks), micro_batch=2)
    plan = SPDPlan.dense(reader.base_model(), 1)
    nll = plan_nll(streamer, plan, tokens())
    assert nll.dtype == torch.float64
    return nll.tolist(), *plan_perplexity(streamer, plan, tokens())


@pytest.mark.parametrize("ranks", [1, 2])
def test_sums_are_those_of_transformers(tmp_path: Path, ranks: int) -> None:
    folder = make_llama(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        expected = [23 * model(t[None], labels=t[None]).loss.double().item() for t in tokens()]
    results = run_ranks(ranks, scored, folder, ranks)
    nll, perplexity, count = results[0]
    assert nll == pytest.approx(expected, rel=1e-5)
    assert len({round(x, 3) for x in nll}) == 5  # telling them apart is the point
    assert perplexity == pytest.approx(math.exp(sum(nll) / (5 * 23)), rel=1e-12)
    assert count == 5 * 23
    assert all(result == results[0] for result in results)
