"""Channel weights of the Fisher loss against autograd through a whole small model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_spd.checkpoint.hf import CheckpointReader
from megatron_spd.distill import fisher
from megatron_spd.errors import UserError
from megatron_spd.runtime.distributed import initialize
from megatron_spd.stages import make_streamer
from tests.models import make_llama
from tests.ranks import run_ranks

LAYERS, SEED = 4, 7


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("m") / "m"
    return make_llama(folder, layers=LAYERS, biases=True, tied=request.param, vocabulary=325)


def make_tokens() -> Tensor:
    return torch.randint(3, 300, (3, 11), generator=torch.Generator().manual_seed(1))


def measured(model: Path, ranks: int, blocks: list[int], micro_batch: int = 8) -> dict[int, Tensor]:
    runtime = initialize(ranks)
    fisher._ROWS = 7
    streamer = make_streamer(CheckpointReader(model), runtime, micro_batch=micro_batch)
    return fisher.output_fisher(streamer, make_tokens(), blocks, SEED)


def by_autograd(model: Path) -> list[Tensor]:
    """Weights of every block: the gradient of the negative log-likelihood of labels drawn from the model."""
    network = AutoModelForCausalLM.from_pretrained(model).double().eval()
    outputs: list[Tensor] = []
    for layer in network.model.layers:
        layer.register_forward_hook(lambda _, __, out: outputs.append(out))
    logits = network(make_tokens()).logits
    draws = torch.rand(
        logits.shape[:2].numel(), generator=torch.Generator().manual_seed(SEED), dtype=torch.float64
    )
    sums = logits.detach().softmax(-1).flatten(0, 1).cumsum(-1)
    labels = (sums < draws[:, None]).sum(-1)
    nll = -logits.log_softmax(-1).flatten(0, 1)[torch.arange(len(labels)), labels].sum()
    gradients = torch.autograd.grad(nll, outputs)
    moments = [g[:, 1:].square().sum((0, 1)) for g in gradients]
    return [m / m.mean() for m in moments]


@pytest.mark.parametrize(("ranks", "micro_batch"), [(1, 8), (1, 2), (2, 8)])
def test_weights_are_those_of_autograd(model: Path, ranks: int, micro_batch: int) -> None:
    wanted = by_autograd(model)
    for got in run_ranks(ranks, measured, model, ranks, [0, 2, 3], micro_batch):
        assert sorted(got) == [0, 2, 3]
        for block, weights in got.items():
            assert torch.allclose(weights.double(), wanted[block], rtol=1e-3)
            assert float(weights.mean()) == pytest.approx(1.0, rel=1e-5)
    # Channels differ, so the weights say something.
    assert float(wanted[0].max() / wanted[0].min()) > 2


def test_no_blocks_no_weights(model: Path) -> None:
    assert run_ranks(1, measured, model, 1, []) == [{}]


def overflowing(folder: Path) -> str:
    streamer = make_streamer(CheckpointReader(folder), initialize())
    weights = streamer.weights
    streamer.weights = lambda block: {n: t * float("nan") for n, t in weights(block).items()}
    try:
        fisher.output_fisher(streamer, make_tokens(), [1], SEED)
    except UserError as error:
        return str(error)
    return ""


def test_gradients_that_are_not_finite_are_one_line(model: Path) -> None:
    (message,) = run_ranks(1, overflowing, model)
    assert "not finite" in message
    assert "--loss mse" in message
    assert "\n" not in message
