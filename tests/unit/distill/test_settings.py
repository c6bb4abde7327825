"""Amounts, budgets and the hash of what decides the weights; the order of what is seen."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_spd.distill.batches import example_order, replica_batches
from megatron_spd.distill.engine import EngineSettings
from megatron_spd.distill.settings import DistillSettings, FinishSettings, TrainingSettings
from megatron_spd.errors import UserError
from megatron_spd.options import TrainingOptions
from megatron_spd.plan import BaseModel, SPDPlan
from megatron_spd.stages import distill_settings, finish_settings

ENGINE = EngineSettings(1e-3, 2, 3, 1.0, 0.0, 0.1, 0, "fp32")
SETTINGS = TrainingSettings(ENGINE, 2)
PLAN = SPDPlan.dense(BaseModel("f", "llama", 2, 8, 2, 2, 8), 2).with_drops([0])


def tokens(sequences: int, length: int = 10) -> Tensor:
    return torch.arange(sequences * length).view(sequences, length)


@pytest.mark.parametrize(("sequences", "judges"), [(2, 1), (8, 1), (16, 2), (64, 8), (1000, 16)])
def test_held_out_sequences(sequences: int, judges: int) -> None:
    assert SETTINGS.held_out_count(sequences) == judges


def test_epochs_or_tokens_say_how_much() -> None:
    assert SETTINGS.examples(7, 10) == 14
    # As many as fit in: 99 tokens are 9 whole sequences.
    assert dataclasses.replace(SETTINGS, tokens=99).examples(7, 10) == 9


@pytest.mark.parametrize(
    ("changes", "sequences", "replicas", "message"),
    [
        ({}, 1, 1, "1 sequence(s); it needs at least 2"),
        ({}, 3, 1, "2 training sequences x 2 epochs give 4 to each replica, less than one step of 2 x 3"),
        ({}, 6, 2, "give 5 to each replica"),
        ({"tokens": 59}, 100, 1, "a budget of 59 tokens is less than one step of 2 x 3 pieces of 10 tokens"),
        ({"tokens": 60}, 100, 2, "on 2 replica(s), which takes 120"),
    ],
)
def test_too_little_is_one_line(changes: dict[str, Any], sequences: int, replicas: int, message: str) -> None:
    with pytest.raises(UserError) as caught:
        dataclasses.replace(SETTINGS, **changes).check_amount(tokens(sequences), replicas)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "sequences", "replicas"), [({}, 4, 1), ({}, 7, 2), ({"tokens": 60}, 2, 1)]
)
def test_just_enough(changes: dict[str, Any], sequences: int, replicas: int) -> None:
    dataclasses.replace(SETTINGS, **changes).check_amount(tokens(sequences), replicas)


def test_what_decides_the_weights_is_in_the_identity() -> None:
    given = DistillSettings(ENGINE, 2)
    changes: list[dict[str, Any]] = [{"tokens": 60}, {"loss": "nmse"}, {"inputs": "student"}, {"seed": 1}]
    marks = [dataclasses.replace(given, **c).identity(PLAN, tokens(4)) for c in [{}, *changes]]
    marks += [given.identity(PLAN, tokens(5)), given.identity(PLAN, tokens(4), "other weights")]
    marks += [given.identity(PLAN.with_drops([1]), tokens(4))]
    finish = FinishSettings(ENGINE, 2)
    marks += [f.identity(PLAN, tokens(4)) for f in (finish, dataclasses.replace(finish, which="vectors"))]
    assert len(set(marks)) == len(marks)


def test_a_time_budget_is_not() -> None:
    timed = dataclasses.replace(SETTINGS, max_seconds=3.0)
    assert timed.identity(PLAN, tokens(4)) == SETTINGS.identity(PLAN, tokens(4))


def test_order_is_random_passes() -> None:
    order = example_order(5, 13, seed=3)
    assert sorted(order[:5].tolist()) == sorted(order[5:10].tolist()) == [0, 1, 2, 3, 4]
    assert len(set(order[10:].tolist())) == 3
    assert not torch.equal(order[:5], order[5:10])
    assert torch.equal(order, example_order(5, 13, seed=3))
    assert not torch.equal(order, example_order(5, 13, seed=4))


def test_a_shorter_training_is_the_beginning_of_a_longer_one() -> None:
    assert torch.equal(example_order(5, 7, 3, "mixed"), example_order(5, 13, 3, "mixed")[:7])


def test_own_inputs_are_examples_of_their_own() -> None:
    plain = example_order(5, 12, seed=3)
    assert torch.equal(example_order(5, 12, 3, "student"), plain + 5)
    mixed = example_order(5, 12, 3, "mixed")
    assert torch.equal(mixed % 5, plain)
    assert ((mixed >= 5).view(-1, 2) == torch.tensor([False, True])).all()


@pytest.mark.parametrize(
    ("micro_batch", "accumulation", "replicas"), [(6, 1, 1), (2, 3, 1), (1, 3, 2), (1, 1, 6)]
)
def test_a_step_sees_the_same_however_it_is_cut(micro_batch: int, accumulation: int, replicas: int) -> None:
    engine = dataclasses.replace(ENGINE, micro_batch_size=micro_batch, gradient_accumulation=accumulation)
    given = TrainingSettings(engine, 2)
    order = example_order(5, 20, seed=3)
    parts = [replica_batches(order, given, rank, replicas) for rank in range(replicas)]
    for step in range(3):
        batches = [batch for part in parts for batch in part[step]]
        assert all(len(batch) == micro_batch for batch in batches)
        assert sorted(torch.cat(batches).tolist()) == sorted(order[6 * step : 6 * step + 6].tolist())
    assert all(len(part) == 3 for part in parts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"finish_learning_rate": 0.0}, "--finish-learning-rate is 0.0; it must be > 0"),
        ({"finish_learning_rate": float("nan")}, "--finish-learning-rate is nan; it must be > 0"),
        ({"distill_tokens": 0}, "--distill-tokens is 0; it must be >= 1"),
        ({"finish_tokens": -5}, "--finish-tokens is -5; it must be >= 1"),
    ],
)
def test_options_out_of_bounds_are_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        TrainingOptions(**options)
    assert str(caught.value) == message


def test_options_become_settings() -> None:
    options = TrainingOptions(
        loss="fisher", inputs="student", distill_tokens=70, finish="vectors", finish_tokens=80, seed=3
    )
    units, last = distill_settings(options, 100.0), finish_settings(options, 40.0)
    assert last is not None
    assert (units.loss, units.inputs, units.tokens, units.seed) == ("fisher", "student", 70, 3)
    assert (last.which, last.tokens, last.epochs, last.recompute) == ("vectors", 80, 1, False)
    assert (units.engine.learning_rate, last.engine.learning_rate) == (3e-4, 1e-4)
    # Half of the time is for the units where a finishing pass follows.
    assert (units.max_seconds, last.max_seconds) == (50.0, 40.0)
    alone = dataclasses.replace(options, finish="none")
    assert distill_settings(alone, 100.0).max_seconds == 100.0
    assert finish_settings(alone, 100.0) is None
