"""lm-eval on our models: its figures against plain arithmetic, and what the user hears when a task cannot run."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from megatron_spd.checkpoint.hf import CheckpointReader
from megatron_spd.errors import UserError
from megatron_spd.evaluate.generate import load_for_generation
from megatron_spd.evaluate.local_tasks import LOCAL_TASKS, continuation_documents
from megatron_spd.evaluate.tasks import PAPER_TASKS, load_tasks, run_tasks, task_names
from tests.models import make_export, make_llama

LIMIT = 8


@torch.no_grad()
def log_likelihood(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, context: str, choice: str
) -> float:
    """log p of ``choice`` behind ``context``."""
    ids = tokenizer(f"{context} {choice}", return_tensors="pt")["input_ids"]
    start = len(tokenizer(context)["input_ids"])
    scores = model(ids).logits[0, start - 1 : -1].log_softmax(-1)
    return float(scores.gather(1, ids[0, start:, None]).sum())


def test_plain_and_spd_models_are_scored_by_what_they_compute(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # lm-eval imports it, and its first import in a process says on standard output which accelerator it found.
    import deepspeed  # noqa: F401

    capsys.readouterr()
    base = make_llama(tmp_path / "base")
    tokenizer = CheckpointReader(base).tokenizer()
    tasks = load_tasks(["spd_continuation", "spd_next_word"])
    right = []
    for folder in (base, make_export(base, tmp_path / "spd", 2, [0, 1, 4])):
        model = load_for_generation(folder)
        found = run_tasks(tasks, model, tokenizer, batch_size=3, limit=LIMIT)
        acc, acc_norm = [], []
        for document in continuation_documents()[:LIMIT]:
            choices = document["choices"]
            scores = [log_likelihood(model, tokenizer, document["context"], c) for c in choices]
            best = [s / len(c) for s, c in zip(scores, choices, strict=True)]
            acc.append(scores.index(max(scores)) == document["label"])
            acc_norm.append(best.index(max(best)) == document["label"])
        assert found["spd_continuation"]["documents"] == LIMIT
        assert found["spd_continuation"]["acc"]["value"] == pytest.approx(sum(acc) / LIMIT)
        assert found["spd_continuation"]["acc_norm"]["value"] == pytest.approx(sum(acc_norm) / LIMIT)
        share = sum(acc) / LIMIT
        error = (share * (1 - share) / (LIMIT - 1)) ** 0.5
        assert found["spd_continuation"]["acc"]["stderr"] == pytest.approx(error)
        # A random model does not know the word that follows.
        assert found["spd_next_word"]["acc"] == {"value": 0.0, "stderr": 0.0}
        right.append(acc)
    assert right[0] != right[1]  # the plan is followed
    assert capsys.readouterr().out == ""


def test_lm_eval_leaves_the_process_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISABLE_MULTIPROC", raising=False)
    load_tasks(["spd_next_word"])
    level = logging.getLogger("lm_eval").level
    logging.getLogger("lm_eval").setLevel(logging.INFO)
    try:
        load_tasks(["spd_next_word"])
        assert logging.getLogger("lm_eval").level == logging.INFO
    finally:
        logging.getLogger("lm_eval").setLevel(level)
    assert "DISABLE_MULTIPROC" not in os.environ


def test_names() -> None:
    assert task_names(" spd_next_word,paper,piqa ,") == ["spd_next_word", *PAPER_TASKS]
    for nothing in ("", " , "):
        with pytest.raises(UserError, match="give task names separated by commas"):
            task_names(nothing)


def test_unknown_names_get_near_ones() -> None:
    with pytest.raises(UserError, match=r"unknown task 'hellaswagg'; did you mean .*hellaswag"):
        load_tasks(["spd_next_word", "hellaswagg"])


def test_data_out_of_reach_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network (tests have none) and with an empty cache."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(UserError, match="the data of task 'arc_easy' cannot be reached") as caught:
        load_tasks(list(PAPER_TASKS))
    assert "\n" not in str(caught.value)
    assert all(name in str(caught.value) for name in LOCAL_TASKS)


def test_without_lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(UserError, match=r'pip install "megatron_spd\[eval\]"'):
        load_tasks(["spd_next_word"])
