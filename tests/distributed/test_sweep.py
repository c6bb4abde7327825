"""The sweep against measuring every candidate by itself."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_spd.calibration.stream import plain_variants
from megatron_spd.checkpoint.hf import CheckpointReader
from megatron_spd.evaluate.perplexity import plan_perplexity
from megatron_spd.plan import SPDPlan
from megatron_spd.runtime.distributed import initialize
from megatron_spd.sensitivity.measure import SetMeasurer
from megatron_spd.sensitivity.sweep import sweep
from megatron_spd.stages import make_streamer
from tests.models import make_llama
from tests.ranks import RankError, run_ranks

BRANCHES = 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("m") / "m", layers=4)


def tokens() -> Tensor:
    return torch.randint(3, 300, (5, 24), generator=torch.Generator().manual_seed(1))


def swept(folder: Path, ranks: int, method: str, which: str, **more: Any) -> dict[str, Any]:
    streamer = make_streamer(CheckpointReader(folder), initialize(ranks), micro_batch=2)
    return sweep(streamer, more.pop("text", tokens()), BRANCHES, method, which, **more)  # type: ignore[arg-type]


def perplexities(folder: Path, drops: list[list[int]]) -> list[float]:
    reader = CheckpointReader(folder)
    streamer = make_streamer(reader, initialize(1))
    plan = SPDPlan.dense(reader.base_model(), BRANCHES)
    return [plan_perplexity(streamer, plan.with_drops(d), tokens())[0] for d in drops]


@pytest.mark.parametrize("ranks", [1, 2])
def test_every_candidate_is_as_measured_by_itself(model: Path, ranks: int) -> None:
    result = run_ranks(ranks, swept, model, ranks, "both", "any")[0]
    # Algorithm 1: attention points of blocks i..3 dropped.
    alone = run_ranks(1, perplexities, model, [[]] + [[2 * b for b in range(i, 4)] for i in range(4)])[0]
    plain, consecutive = alone[0], alone[1:]
    assert result["plain_perplexity"] == pytest.approx(plain, rel=1e-5)
    assert [e["perplexity"] for e in result["algorithm1"]] == pytest.approx(consecutive, rel=1e-5)
    following = [*consecutive[1:], plain]
    wanted = [p - q for p, q in zip(consecutive, following, strict=True)]
    assert [e["sensitivity"] for e in result["algorithm1"]] == pytest.approx(wanted, abs=1e-4 * plain)
    # Single points; the last MLP point cannot be dropped.
    assert [e["point"] for e in result["single"]] == list(range(7))
    single = run_ranks(1, perplexities, model, [[p] for p in range(7)])[0]
    assert [e["perplexity"] for e in result["single"]] == pytest.approx(single, rel=1e-5)
    assert [e["sensitivity"] for e in result["single"]] == pytest.approx(
        [p - plain for p in single], abs=1e-4 * plain
    )


@pytest.mark.parametrize(("which", "points"), [("attention", [0, 2, 4, 6]), ("mlp", [1, 3, 5])])
def test_only_the_asked_points_are_measured(model: Path, which: str, points: list[int]) -> None:
    result = run_ranks(1, swept, model, 1, "single", which)[0]
    assert [e["point"] for e in result["single"]] == points
    assert result["algorithm1"] is None


def test_perplexity_is_that_of_transformers(model: Path) -> None:
    reference = AutoModelForCausalLM.from_pretrained(model).eval()
    with torch.no_grad():
        losses = [reference(t[None], labels=t[None]).loss for t in tokens()]
    wanted = torch.stack(losses).double().mean().exp()
    assert run_ranks(2, swept, model, 2, "single", "attention")[1]["plain_perplexity"] == pytest.approx(
        float(wanted), rel=1e-5
    )


# ---- low-bit points ------------------------------------------------------------------------------------------------

FORMATS = ("int8", "int2:g16")


def long_text() -> Tensor:
    """Pieces whose messages are not too small for low-bit all-reduces between ranks."""
    return torch.randint(3, 300, (2, 512), generator=torch.Generator().manual_seed(2))


def low_bit_figures(folder: Path, text: Tensor) -> list[tuple[float, float]]:
    """For every point and format the perplexity of the plan with that point alone low-bit, and what its divergence
    stands for, each by a whole pass."""
    reader = CheckpointReader(folder)
    streamer = make_streamer(reader, initialize(1), micro_batch=2)
    dense = SPDPlan.dense(reader.base_model(), BRANCHES)
    figures = []
    for point in range(8):
        for name in FORMATS:
            points = [name if p == point else "full" for p in range(8)]
            plan = dataclasses.replace(dense, sync_points=points)
            measurer = SetMeasurer(streamer, plain_variants(BRANCHES, 4), dense, text)
            figures.append((plan_perplexity(streamer, plan, text)[0], measurer.collectives(points)[0]))
    return figures


@pytest.mark.parametrize(("ranks", "text"), [(1, tokens()), (1, long_text()), (2, long_text())])
def test_low_bit_points_are_as_measured_by_themselves(model: Path, ranks: int, text: Tensor) -> None:
    wanted = run_ranks(1, low_bit_figures, model, text)[0]
    for measure, place in (("perplexity", 0), ("kl", 1)):
        more = {"collectives": FORMATS, "measure": measure, "text": text}
        result = run_ranks(ranks, swept, model, ranks, "single", "any", **more)[0]
        entries = result["low_bit"]
        assert [(e["point"], e["collective"]) for e in entries] == [(p, n) for p in range(8) for n in FORMATS]
        assert [(e["block"], e["kind"]) for e in entries[:6:2]] == [
            (0, "attention"),
            (0, "mlp"),
            (1, "attention"),
        ]
        found = [e["perplexity"] for e in entries]
        assert found == pytest.approx([w[place] for w in wanted], rel=1e-4 if ranks > 1 else 1e-6)
        plain = result["plain_perplexity"]
        assert [e["sensitivity"] for e in entries] == pytest.approx([p - plain for p in found])
    # Two bits hurt, and drops are measured as ever.
    assert min(e["sensitivity"] for e in entries[1::2]) > 10 * max(e["sensitivity"] for e in entries[::2]) > 0
    alone = run_ranks(ranks, swept, model, ranks, "single", "any", measure="kl", text=text)[0]
    assert (alone["single"], alone["low_bit"]) == (result["single"], None)


def test_low_bit_points_of_one_kind(model: Path) -> None:
    result = run_ranks(1, swept, model, 1, "algorithm1", "mlp", collectives=("int8",))[0]
    assert [e["point"] for e in result["low_bit"]] == [1, 3, 5, 7]
    assert result["single"] is None


def test_messages_too_small_to_be_measured_on_several_ranks(model: Path) -> None:
    with pytest.raises(RankError, match=r"messages of 3072 bytes.*--seq-length, or --ranks 1"):
        run_ranks(2, swept, model, 2, "single", "any", collectives=("int8",))


def test_ranks_that_round_sums_of_branches(tmp_path: Path) -> None:
    four = make_llama(tmp_path / "m", heads=4, kv=4, layers=2)
    with pytest.raises(RankError, match="give --ranks 1 or --ranks 4"):
        run_ranks(2, swept_in_four, four)


def swept_in_four(folder: Path) -> dict[str, Any]:
    streamer = make_streamer(CheckpointReader(folder), initialize(2))
    return sweep(streamer, long_text(), 4, "single", "any", collectives=("int8",))
