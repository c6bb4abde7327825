"""Intervals against what is known in closed form, and how often they hold the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_spd.evaluate.statistics import paired_difference, perplexity_interval

TOKENS = 100


def draws(n: int, seed: int, spread: float = 0.3) -> np.ndarray:
    """Sums of -log p of ``n`` sequences, normal around 3 nats a token."""
    return TOKENS * np.random.default_rng(seed).normal(3.0, spread, n)


def test_perplexity_is_that_of_all_tokens() -> None:
    nll = draws(8, 0)
    assert perplexity_interval(nll, TOKENS).perplexity == pytest.approx(math.exp(nll.sum() / (8 * TOKENS)))


def test_equal_sequences_leave_no_doubt() -> None:
    found = perplexity_interval([TOKENS * math.log(2)] * 5, TOKENS)
    assert (found.perplexity, found.low, found.high) == pytest.approx((2, 2, 2))


@pytest.mark.parametrize(("confidence", "deviations"), [(0.95, 1.96), (0.5, 0.6745)])
def test_many_sequences_give_the_normal_interval(confidence: float, deviations: float) -> None:
    nll = draws(400, 1)
    found = perplexity_interval(nll, TOKENS, confidence)
    mean, error = nll.mean() / TOKENS, nll.std(ddof=1) / TOKENS / math.sqrt(400)
    assert math.log(found.low) == pytest.approx(mean - deviations * error, abs=0.1 * error)
    assert math.log(found.high) == pytest.approx(mean + deviations * error, abs=0.1 * error)


def test_few_sequences_are_not_taken_for_certain() -> None:
    """95 of 100 intervals from eight sequences hold the true value; plain percentiles would be right 89 times."""
    held = [
        f.low < math.exp(3.0) < f.high
        for f in (perplexity_interval(draws(8, seed), TOKENS, resamples=1000) for seed in range(400))
    ]
    assert 0.925 < np.mean(held) < 0.98


def test_pairs_cancel_what_makes_a_sequence_hard() -> None:
    plain = draws(8, 2)
    other = plain + TOKENS * (math.log(1.1) + np.linspace(-0.01, 0.01, 8))
    found = paired_difference(plain, other, TOKENS)
    ratio = perplexity_interval(other, TOKENS).perplexity / perplexity_interval(plain, TOKENS).perplexity
    assert found.increase == pytest.approx(100 * (ratio - 1))
    assert found.increase == pytest.approx(10)
    assert 8.5 < found.low < 10 < found.high < 11.5
    # In another order the pairs are lost, and with them the certainty.
    unpaired = paired_difference(plain, other[::-1], TOKENS)
    assert unpaired.high - unpaired.low > 10 * (found.high - found.low)


def test_a_better_model_has_a_negative_increase() -> None:
    plain = draws(20, 3)
    found = paired_difference(plain, plain - TOKENS * math.log(2), TOKENS)
    assert (found.increase, found.low, found.high) == pytest.approx((-50, -50, -50))


def test_one_sequence_has_no_interval() -> None:
    found = perplexity_interval([TOKENS * 1.0], TOKENS)
    assert found.perplexity == pytest.approx(math.e)
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    assert math.isnan(paired_difference([1.0], [2.0], TOKENS).low)


def test_the_seed_decides() -> None:
    nll = draws(8, 4)
    assert perplexity_interval(nll, TOKENS, seed=5) == perplexity_interval(nll, TOKENS, seed=5)
    assert perplexity_interval(nll, TOKENS, seed=5) != perplexity_interval(nll, TOKENS, seed=6)


def test_a_ruined_model_has_a_number_too() -> None:
    assert math.isfinite(perplexity_interval([1e6, 2e6], 10).high)


def test_bad_input() -> None:
    for nll in ([], [[1.0, 2.0]]):
        with pytest.raises(ValueError, match="expected \\[n\\] with n >= 1"):
            perplexity_interval(nll, TOKENS)
    with pytest.raises(ValueError, match="confidence is 1"):
        perplexity_interval([1.0, 2.0], TOKENS, confidence=1)
    with pytest.raises(ValueError, match="2 sequences of the plain model, 3 of the other"):
        paired_difference([1.0, 2.0], [1.0, 2.0, 3.0], TOKENS)
