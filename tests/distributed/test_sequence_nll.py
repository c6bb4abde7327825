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


def diverged(folder: Path, ranks: int) -> list[float]:
    """KL of the stream behind the last block from the one before it, sequence by sequence."""
    streamer = make_streamer(CheckpointReader(folder), initialize(ranks), micro_batch=2)
    x = streamer.embed(tokens())
    streams = [x]
    for block in range(streamer.num_layers):
        streams.append(streamer.advance(block, streams[-1]))
    return streamer.sequence_kl(streams[-2], streams[-1]).tolist()


@pytest.mark.parametrize("ranks", [1, 2])
def test_divergences_are_those_of_transformers(tmp_path: Path, ranks: int) -> None:
    folder = make_llama(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder)
    last = model.model.layers[-1]
    with torch.no_grad():
        p = model(tokens()).logits[:, :-1].double().log_softmax(-1)
        # What the model says with its last block left out: the block's own input goes to the final norm.
        last.register_forward_hook(lambda module, args, output: args[0])
        q = model(tokens()).logits[:, :-1].double().log_softmax(-1)
    expected = (p.exp() * (p - q)).sum((1, 2))
    assert expected.min() > 0.01
    results = run_ranks(ranks, diverged, folder, ranks)
    assert results[0] == pytest.approx(expected.tolist(), rel=1e-3)
    assert all(result == results[0] for result in results)
