"""Measured sets of dropped points against whole passes of the same plan, in any order of calls and on several ranks."""

from __future__ import annotations

import dataclasses
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_spd.calibration.stream import BlockStreamer, plain_variants
from megatron_spd.checkpoint.hf import CheckpointReader
from megatron_spd.compensation import calibrated_units, make_calibrator
from megatron_spd.evaluate.perplexity import plan_nll, plan_perplexity
from megatron_spd.grouping.calibrate import Ingredients
from megatron_spd.grouping.provider import CACHE_BYTES, CalibratedUnits
from megatron_spd.plan import BRANCH_FLAGS, SPDPlan
from megatron_spd.planning import make_search
from megatron_spd.runtime.distributed import initialize
from megatron_spd.sensitivity.cheapest import CheapestResult
from megatron_spd.sensitivity.measure import SetMeasurer
from megatron_spd.sensitivity.neighbours import Prices
from megatron_spd.sensitivity.optimize import PlanOptimizer
from megatron_spd.stages import make_streamer
from tests.models import make_llama
from tests.ranks import run_ranks

LAYERS, BRANCHES = 5, 2
#: Each ends where another begins, is part of another, or comes back after others have replaced what is kept of it.
RANDOM = random.Random(3)
SETS = [tuple(sorted(RANDOM.sample(range(2 * LAYERS - 1), RANDOM.randint(0, 6)))) for _ in range(8)]
CALLS = [*SETS, (), *SETS[:4], tuple(range(2 * LAYERS - 1)), SETS[0]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("m") / "m", heads=4, kv=4, layers=LAYERS)


def tokens(seed: int = 1, sequences: int = 5) -> Tensor:
    return torch.randint(3, 300, (sequences, 16), generator=torch.Generator().manual_seed(seed))


def opened(folder: Path, ranks: int) -> tuple[BlockStreamer, SPDPlan]:
    reader = CheckpointReader(folder)
    streamer = make_streamer(reader, initialize(ranks), micro_batch=2)
    return streamer, SPDPlan.dense(reader.base_model(), BRANCHES)


#: The paper's choice of heads is made on the main rank's own sequences; all else is the same for any number of ranks.
SAME_ON_ANY_RANKS = Ingredients(heads="none")


def measured(folder: Path, ranks: int, grouped: bool) -> list[tuple[float, float, Tensor]]:
    """For each of CALLS the two figures of one measurer, and its hidden states' log-likelihoods of the sequences."""
    streamer, dense = opened(folder, ranks)
    variants = plain_variants(BRANCHES, LAYERS)
    if grouped:
        variants = calibrated_units(streamer, BRANCHES, tokens(2), SAME_ON_ANY_RANKS)
    measurer = SetMeasurer(streamer, variants, dense, tokens())
    figures = []
    for points in CALLS:
        nll = streamer.sequence_nll(measurer.states(points), tokens())
        figures.append((measurer(points), measurer.with_perplexity(points), nll))
    return figures


def whole_passes(folder: Path, ranks: int, grouped: bool) -> list[Tensor]:
    """The same from the embedding on, nothing kept from call to call: log-likelihoods only."""
    streamer, dense = opened(folder, ranks)
    variants = calibrated_units(streamer, BRANCHES, tokens(2), SAME_ON_ANY_RANKS) if grouped else None
    return [plan_nll(streamer, dense.with_drops(points), tokens(), variants=variants) for points in CALLS]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("grouped", [False, True])
def test_what_is_kept_from_call_to_call_changes_nothing(model: Path, ranks: int, grouped: bool) -> None:
    wanted = run_ranks(ranks, whole_passes, model, ranks, grouped)[0]
    for answers in run_ranks(ranks, measured, model, ranks, grouped):
        for points, (_, _, nll), whole in zip(CALLS, answers, wanted, strict=True):
            assert torch.equal(nll, whole), points


@pytest.mark.parametrize("grouped", [False, True])
def test_ranks_measure_the_same(model: Path, grouped: bool) -> None:
    one = run_ranks(1, measured, model, 1, grouped)[0]
    for answers in run_ranks(2, measured, model, 2, grouped):
        for points, (damage, both, _), wanted in zip(CALLS, answers, one, strict=True):
            assert math.log(damage) == pytest.approx(math.log(wanted[0]), rel=1e-4), points
            assert math.log(both) == pytest.approx(math.log(wanted[1]), rel=1e-4), points


def test_the_damage_is_the_divergence_from_the_plain_model(model: Path) -> None:
    """plain * exp(KL), with the KL divergence of whole logits in float64."""
    answers = run_ranks(1, measured, model, 1, False)[0]
    logits = run_ranks(1, final_logits, model)[0]
    plain = logits[CALLS.index(())].log_softmax(-1)
    targets = tokens().T[1:, :, None]
    nll = -plain.gather(-1, targets).mean()
    for points, (damage, both, _), z in zip(CALLS, answers, logits, strict=True):
        q = z.log_softmax(-1)
        divergence = (plain.exp() * (plain - q)).sum(-1).mean()
        own = -q.gather(-1, targets).mean()
        assert math.log(damage) == pytest.approx(float(nll + divergence), rel=1e-4), points
        assert math.log(both) == pytest.approx(float(nll + max(divergence, own - nll)), rel=1e-4), points
    assert answers[CALLS.index(())][0] == pytest.approx(math.exp(nll), rel=1e-4)


def final_logits(folder: Path) -> list[Tensor]:
    """Logits [s - 1, n, vocabulary] of the scored positions for each of CALLS, in float64."""
    streamer, dense = opened(folder, 1)
    measurer = SetMeasurer(streamer, plain_variants(BRANCHES, LAYERS), dense, tokens())
    reader = streamer.reader
    norm, table = (reader.get(n).double() for n in (reader.family.final_norm, reader.family.embedding))
    found = []
    for points in CALLS:
        x = torch.cat(measurer.states(points), 1)[:-1].double()
        scale = (x.square().mean(-1, keepdim=True) + reader.config["rms_norm_eps"]).rsqrt()
        found.append((x * scale * norm) @ table.T)
    return found


# ---- low-bit points beside dropped ones ----------------------------------------------------------------------------


def choices() -> list[tuple[str, ...]]:
    """Sets of drops with low-bit points in, between and behind their units; some come back or differ late."""
    rng = random.Random(5)
    found = []
    for points in CALLS:
        kept = [rng.choice(("full", "int8", "int3:g16")) for _ in range(2 * LAYERS)]
        found.append(tuple("none" if p in points else c for p, c in enumerate(kept)))
    low_bit = ("int8",) * (2 * LAYERS)
    return [*found, low_bit, (*low_bit[:-1], "int2:g8"), found[0]]


def measured_choices(folder: Path, grouped: bool) -> list[tuple[tuple[float, float], float]]:
    """For each of choices() the measurer's two figures, and the perplexity of a whole pass of the same plan."""
    streamer, dense = opened(folder, 1)
    variants = plain_variants(BRANCHES, LAYERS)
    if grouped:
        variants = calibrated_units(streamer, BRANCHES, tokens(2), SAME_ON_ANY_RANKS)
    measurer = SetMeasurer(streamer, variants, dense, tokens())
    figures = [measurer.collectives(choice) for choice in choices()]
    found = []
    for choice, pair in zip(choices(), figures, strict=True):
        plan = dataclasses.replace(dense, sync_points=list(choice))
        own = streamer
        if grouped:
            # The plan and the weights that an export of it has.
            calibrated: dict[int, Any] = {}
            for unit in plan.units():
                calibrated |= variants(plan.points_in(unit))
            for block, variant in calibrated.items():
                flags = {name: getattr(variant.schedule, name) for name in BRANCH_FLAGS}
                plan = plan.with_block(block, **flags)
            own = with_blocks(streamer, {b: v.own for b, v in calibrated.items()})
        found.append((pair, plan_perplexity(own, plan, tokens())[0]))
    return found


def with_blocks(streamer: BlockStreamer, blocks: dict[int, Any]) -> BlockStreamer:
    """A fresh streamer (one rank) whose ``blocks`` have other weights."""
    reader = streamer.reader
    return BlockStreamer(
        reader,
        streamer.runtime,
        streamer.dtype,
        lambda block: blocks[block] if block in blocks else reader.block(block),
        streamer.micro_batch,
    )


@pytest.mark.parametrize("grouped", [False, True])
def test_low_bit_points_are_measured_with_the_drops(model: Path, grouped: bool) -> None:
    for choice, ((_, found), wanted) in zip(
        choices(), run_ranks(1, measured_choices, model, grouped)[0], strict=True
    ):
        assert found == pytest.approx(wanted, rel=1e-6), choice


def found_cheapest(folder: Path, ranks: int) -> CheapestResult:
    """The cheapest choice of a made-up optimiser, measured on text that several ranks can measure low-bit on."""
    streamer, _ = opened(folder, ranks)
    text = torch.randint(3, 300, (2, 512), generator=torch.Generator().manual_seed(4))
    drops = {p: 0.02 * (p + 1) for p in range(2 * LAYERS - 1)}
    formats = {"int8": dict.fromkeys(range(2 * LAYERS), 1e-4)}
    costs = {"none": 0.0, "full": 4.0, "int8": 1.0}
    optimizer = PlanOptimizer(2 * LAYERS, drops, formats, costs, Prices(0.0, 0.0))
    variants = plain_variants(BRANCHES, LAYERS)
    search = make_search(streamer, BRANCHES, variants, text, 5, None, "")
    return search.cheapest(optimizer, 1.0)


def test_ranks_find_the_same_choice(model: Path) -> None:
    one = run_ranks(1, found_cheapest, model, 1)[0]
    first, second = run_ranks(2, found_cheapest, model, 2)
    assert first == second
    assert [c.collectives for c in first.history] == [c.collectives for c in one.history]
    assert first.best.collectives == one.best.collectives
    assert first.best.confirmed == pytest.approx(one.best.confirmed, rel=1e-4)
    assert 1 < len(one.history) <= 5
    assert one.best.collectives != ("full",) * (2 * LAYERS)


# ---- calibrated units -----------------------------------------------------------------------------------------------

UNITS = [(0,), (1, 2), (4,), (0,), (3, 4, 5), (1, 2), (4,), (0,)]


def provided(folder: Path, ranks: int, cache_bytes: int) -> tuple[list[dict[int, Any]], int]:
    """For each of UNITS its blocks' schedules and weights, and how many units were calibrated for that."""
    streamer, dense = opened(folder, ranks)
    calibrator = make_calibrator(streamer, BRANCHES, Ingredients())
    calibrate, calls = calibrator.calibrate, 0

    def counted(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        return calibrate(*args)

    calibrator.calibrate = counted  # type: ignore[method-assign]
    units = CalibratedUnits(streamer, calibrator, dense, tokens(2), cache_bytes)
    # Copies: what is let go must not change what was handed out.
    found = [
        {b: (v.schedule, {n: t.clone() for n, t in (v.own or {}).items()}) for b, v in units(points).items()}
        for points in UNITS
    ]
    return found, calls


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_unit_that_was_let_go_is_calibrated_again_with_the_same_result(model: Path, ranks: int) -> None:
    kept = run_ranks(ranks, provided, model, ranks, CACHE_BYTES)
    let_go = run_ranks(ranks, provided, model, ranks, 1)
    for (units, once), (again, often) in zip(kept, let_go, strict=True):
        assert (once, often) == (len(set(UNITS)), len(UNITS))
        for points, one, other in zip(UNITS, units, again, strict=True):
            assert one.keys() == other.keys()
            for block, (schedule, weights) in one.items():
                assert other[block][0] == schedule, points
                assert other[block][1].keys() == weights.keys()
                assert all(torch.equal(other[block][1][n], t) for n, t in weights.items()), points


def two_units(folder: Path) -> str:
    streamer, _ = opened(folder, 1)
    with pytest.raises(ValueError, match="make 2 units") as caught:
        calibrated_units(streamer, BRANCHES, tokens(2), Ingredients())((0, 4))
    return str(caught.value)


def test_points_of_two_units_are_refused(model: Path) -> None:
    assert "expected one" in run_ranks(1, two_units, model)[0]
