"""A tiny trained model and the command lines of a full recovery of it: helpers of ``test_full`` and ``test_resume``.

The model is trained, for its perplexities to be ones that a percentage says something about: those of a random model
are astronomical.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from tests.models import llama_config, tiny_text, tiny_tokenizer

LAYERS, BRANCHES = 4, 2
#: Pieces that sensitivity is measured on, that calibration uses behind them, and that are distilled on.
SEQUENCES, CALIBRATION, DISTILLED, LENGTH = 3, 8, 8, 24
#: The first piece that `run` scores on: behind all others.
SCORED_FROM, SCORED = SEQUENCES + CALIBRATION, 6
#: Half of the seven droppable points, rounded, found among this many measured sets.
DROPS, BUDGET = 4, 3
#: Whatever is dropped is damage enough to be distilled.
TIERS = ["--tau1", 0, "--tau2", 0]
TRAINING = ["--epochs", 2, "--micro-batch-size", 2, "--learning-rate", 1e-3, "--tracking", "none"]


def make_world(folder: Path, hidden: int = 32, groups: int = 4) -> Path:
    """``folder`` with ``model``, whose key/value groups branches can share out in several ways, and ``text``."""
    text = tiny_text()
    (folder / "text").write_text(text, encoding="utf-8")
    tokenizer = tiny_tokenizer()
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    pieces = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config(hidden, groups, groups, LAYERS))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        batch = pieces[torch.randint(len(pieces), (8,))]
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder


def data(world: Path, sequences: int = SEQUENCES) -> list[object]:
    return ["--data", world / "text", "--sequences", sequences, "--seq-length", LENGTH]


def run_arguments(world: Path, out: Path, *more: object) -> list[object]:
    """`run` with the defaults for what is dropped and how it is recovered."""
    fixed = ["run", "--model", world / "model", "--out", out, "--branches", BRANCHES, *data(world)]
    fixed += ["--calibration-sequences", CALIBRATION, "--search-budget", BUDGET, *TIERS]
    return [*fixed, "--eval-sequences", SCORED, "--distill-sequences", DISTILLED, *TRAINING, *more]
