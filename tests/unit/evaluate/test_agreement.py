"""Greedy continuations with a cache and in batches against one full forward for each token."""

from __future__ import annotations

import random

import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer
from torch import Tensor
from transformers import LlamaForCausalLM

from megatron_spd.evaluate.agreement import (
    Agreement,
    forced_choices,
    greedy_continuations,
    measure_agreement,
    prompts_from,
    rouge_l,
)
from megatron_spd.evaluate.generate import load_for_generation
from tests.models import make_export, make_llama

COUNT = 12


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    """A plain model, and the SPD model with attention and MLP points dropped."""
    folder = tmp_path_factory.mktemp("models")
    base = make_llama(folder / "base")
    return load_for_generation(base), load_for_generation(make_export(base, folder / "spd", 2, [0, 1, 4]))


@pytest.fixture
def prompts() -> Tensor:
    return torch.randint(3, 300, (3, 5), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def slowly(model: LlamaForCausalLM, prompt: list[int], count: int) -> list[int]:
    """Greedy continuation of one prompt without a cache."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_continuations_are_the_greedy_ones(
    models: tuple[LlamaForCausalLM, LlamaForCausalLM], prompts: Tensor
) -> None:
    for model in models:
        expected = [slowly(model, prompt, COUNT) for prompt in prompts.tolist()]
        assert greedy_continuations(model, prompts, COUNT).tolist() == expected
    # Forced onto its own text a model chooses that text.
    own = greedy_continuations(models[1], prompts, COUNT)
    assert torch.equal(forced_choices(models[1], prompts, own), own)


def test_agreement_is_counted_as_defined(
    models: tuple[LlamaForCausalLM, LlamaForCausalLM], prompts: Tensor
) -> None:
    plain, spd = models
    texts = [slowly(plain, prompt, COUNT) for prompt in prompts.tolist()]
    same, prefixes, scores = 0, [], []
    for prompt, text in zip(prompts.tolist(), texts, strict=True):
        same += sum(slowly(spd, prompt + text[:i], 1) == [text[i]] for i in range(COUNT))
        own = slowly(spd, prompt, COUNT)
        prefixes.append(next((i for i in range(COUNT) if own[i] != text[i]), COUNT))
        scores.append(rouge_l(text, own))
    found = measure_agreement(spd, prompts, torch.tensor(texts))
    assert found.agreement == pytest.approx(same / (3 * COUNT))
    assert found.same_prefix == pytest.approx(sum(prefixes) / 3)
    assert found.rouge_l == pytest.approx(sum(scores) / 3)
    assert found.agreement < 1


def test_a_model_agrees_with_itself(
    models: tuple[LlamaForCausalLM, LlamaForCausalLM], prompts: Tensor
) -> None:
    plain = greedy_continuations(models[0], prompts, COUNT)
    assert measure_agreement(models[0], prompts, plain) == Agreement(1.0, COUNT, 1.0)


def test_the_end_token_does_not_cut_a_text_short(
    models: tuple[LlamaForCausalLM, LlamaForCausalLM], prompts: Tensor
) -> None:
    """Every token is declared the end of text: as many as asked for come all the same."""
    model = models[0]
    before = greedy_continuations(model, prompts, COUNT)
    stored, model.config.eos_token_id = model.config.eos_token_id, int(before[0, 1])
    try:
        assert torch.equal(greedy_continuations(model, prompts, COUNT), before)
    finally:
        model.config.eos_token_id = stored


def test_rouge_l_is_the_usual_one() -> None:
    class Words:
        def tokenize(self, text: str) -> list[str]:
            return text.split()

    scorer = RougeScorer(["rougeL"], tokenizer=Words())
    generator = random.Random(0)
    for _ in range(30):
        one, other = ([generator.randrange(5) for _ in range(generator.randrange(1, 20))] for _ in range(2))
        expected = scorer.score(" ".join(map(str, one)), " ".join(map(str, other)))["rougeL"].fmeasure
        assert rouge_l(one, other) == pytest.approx(expected)
    assert rouge_l([1, 2, 3, 4], [1, 3]) == pytest.approx(2 * 2 / 6)
    assert rouge_l([1, 2], [3]) == rouge_l([], [3]) == rouge_l([], []) == 0


def test_prompts_are_the_first_tokens_of_the_first_pieces() -> None:
    tokens = torch.arange(20 * 40).view(20, 40)
    assert torch.equal(prompts_from(tokens), tokens[:8, :32])
    assert torch.equal(prompts_from(tokens[:2, :4]), tokens[:2, :4])
