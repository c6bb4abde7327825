"""Whole models through Megatron-core: transformers' logits in, the export's logits out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_spd.calibration.stream import model_shape
from megatron_spd.checkpoint.hf import CheckpointReader
from megatron_spd.evaluate.generate import load_for_generation
from megatron_spd.models.build import build_gpt_model
from megatron_spd.plan import SPDPlan
from megatron_spd.runtime.distributed import initialize
from megatron_spd.stages import final_weights
from tests.models import LLAMA3_ROPE, make_export, make_llama
from tests.ranks import run_ranks

TOLERANCE = 1e-4


def megatron_logits(folder: Path, ids: Tensor, ranks: int, branches: int) -> Tensor:
    """Logits [b, s, vocab] of the plain or exported model in ``folder`` by GPTModel on ``ranks`` ranks."""
    runtime = initialize(ranks)
    reader = CheckpointReader(folder)
    plan = reader.plan or SPDPlan.dense(reader.base_model(), branches)
    model = build_gpt_model(
        model_shape(reader), plan, final_weights(reader, plan), reader.get, runtime, torch.float32
    ).eval()
    length = ids.shape[1]
    mask = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]
    positions = torch.arange(length).expand_as(ids)
    with torch.no_grad():
        logits = model(ids, positions, mask, runtime_gather_output=True)
    return logits[..., : reader.config["vocab_size"]]


def token_ids(vocabulary: int, shape: tuple[int, int] = (2, 48)) -> Tensor:
    return torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(0))


VARIANTS: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"tied": False},
    "biases": {"biases": True, "tied": False},
    "llama3 rope": {"rope_scaling": LLAMA3_ROPE},
    "rope theta": {"rope_theta": 500000.0},
    "multi-head attention": {"heads": 6, "kv": 6, "head_dim": 8},
    "head size of its own": {"head_dim": 16},
    # A vocabulary that does not divide by the ranks is padded.
    "odd vocabulary": {"vocabulary": 331, "tied": False},
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_logits_are_those_of_transformers(tmp_path: Path, variant: dict[str, Any], ranks: int) -> None:
    folder = make_llama(tmp_path / "m", **({"hidden": 48, "heads": 12, "kv": 6, "ffn": 48} | variant))
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = token_ids(model.config.vocab_size)
    wanted = model(ids).logits
    for got in run_ranks(ranks, megatron_logits, folder, ids, ranks, ranks):
        assert (got - wanted).abs().max() < TOLERANCE


@pytest.mark.parametrize("dropped", [(0, 2, 4), (1, 2, 3), (0, 1, 2, 3, 4)])
@pytest.mark.parametrize("ranks", [1, 3])
def test_the_export_has_the_logits_of_the_megatron_run(
    tmp_path: Path, dropped: tuple[int, ...], ranks: int
) -> None:
    base = make_llama(tmp_path / "m", hidden=48, heads=12, kv=6, ffn=48, biases=True, tied=False)
    shifts = [(p // 2 + p % 2, "mlp" if p % 2 == 0 else "attention") for p in dropped]
    norms = [(0, "attention"), *shifts]
    folder = make_export(base, tmp_path / "x", 3, dropped, shifts, norms=norms)
    ids = token_ids(CheckpointReader(base).config["vocab_size"])
    with torch.no_grad():
        wanted = load_for_generation(folder)(ids).logits
        dense = AutoModelForCausalLM.from_pretrained(base).eval()(ids).logits
    got = run_ranks(ranks, megatron_logits, folder, ids, ranks, 3)[0]
    assert (got - wanted).abs().max() < TOLERANCE
    # The schedule matters on this model, so equal logits say something.
    assert (got - dense).abs().max() > 100 * TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 3])
def test_smollm2_logits(smollm2: Path, ranks: int) -> None:
    reader = CheckpointReader(smollm2)
    ids = torch.tensor(
        [reader.tokenizer()("Sync points are where the ranks of a model wait for each other.").input_ids]
    )
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(smollm2).eval()(ids).logits
    got = run_ranks(ranks, megatron_logits, smollm2, ids, ranks, 3, timeout=120)[0]
    assert (got - wanted).abs().max() < TOLERANCE


@pytest.mark.slow
def test_smollm2_export_logits(smollm2: Path, tmp_path: Path) -> None:
    # Points that a plan would drop (docs: sensitivity), runs over several blocks among them; the sensitive first blocks
    # amplify the rounding of either side a thousand times.
    folder = make_export(smollm2, tmp_path / "x", 3, [10, 14, 16, 21, 22, 24, 37, 44, 48, 50, 52, 54, 56])
    ids = token_ids(40000, (1, 32))
    with torch.no_grad():
        wanted = load_for_generation(folder)(ids).logits
    got = run_ranks(3, megatron_logits, folder, ids, 3, 3, timeout=120)[0]
    assert (got - wanted).abs().max() < TOLERANCE
