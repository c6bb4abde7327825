"""What is timed: decoding with a KV cache gives the model's tokens, collectives are the plan's, the limit has none."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import mappings
from torch import Tensor

from megatron_spd.checkpoint.hf import CheckpointReader
from megatron_spd.collective import CollectiveFormat
from megatron_spd.comm.lowbit import exchanged_bytes
from megatron_spd.errors import UserError
from megatron_spd.evaluate.generate import load_for_generation
from megatron_spd.latency.clock import WallClock
from megatron_spd.latency.collectives import recorded, silenced
from megatron_spd.latency.measure import Runner, Workload, measure, measure_link
from megatron_spd.latency.model import CachedModel, load_model, share_weights
from megatron_spd.latency.variants import LIMIT, PLAIN, make_variants
from megatron_spd.plan import SPDPlan
from megatron_spd.runtime.distributed import Runtime, initialize
from tests.models import VOCABULARY, make_export, make_llama
from tests.ranks import run_ranks

NEW = 6
SHAPE: dict[str, Any] = {"hidden": 48, "heads": 12, "kv": 6, "ffn": 48}


def prompts(batch: int, length: int = 11) -> Tensor:
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(batch))


def recomputed(folder: Path, ids: Tensor) -> Tensor:
    """The greedy continuation [b, NEW] by transformers, the whole text at every step."""
    model, start = load_for_generation(folder), ids.shape[1]
    with torch.no_grad():
        for _ in range(NEW):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    return ids[:, start:]


def cached_model(folder: Path, runtime: Runtime, branches: int) -> CachedModel:
    reader = CheckpointReader(folder)
    plan = reader.plan or SPDPlan.dense(reader.base_model(), branches)
    model = load_model(reader, plan, runtime, torch.float32)
    return CachedModel(model, int(reader.config["vocab_size"]), max_batch=4, max_length=40)


def continued(folder: Path, texts: list[Tensor], ranks: int, branches: int) -> list[Tensor]:
    """The continuation of each of ``texts`` by one cached model, one after the other."""
    model = cached_model(folder, initialize(ranks), branches)
    found = []
    for ids in texts:
        tokens = [model.prefill(ids)]
        while len(tokens) < NEW:
            tokens.append(model.decode(tokens[-1]))
        found.append(torch.stack(tokens, 1))
    return found


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("dropped", [(), (0, 2, 4), (1, 2), (0, 1, 2, 3, 4)])
def test_cached_decoding_is_full_recomputation(tmp_path: Path, ranks: int, dropped: tuple[int, ...]) -> None:
    branches = 3 if ranks == 1 else ranks
    folder = make_llama(tmp_path / "m", **SHAPE, tied=False, biases=True)
    if dropped:
        after = [(p // 2 + p % 2, "mlp" if p % 2 == 0 else "attention") for p in dropped]
        folder = make_export(folder, tmp_path / "x", branches, dropped, after, norms=after)
    # The cache of the longer and larger first batch must not show in the second.
    texts = [prompts(3, 19), prompts(2)]
    wanted = [recomputed(folder, ids) for ids in texts]
    assert not torch.equal(wanted[0][0], wanted[0][1])
    for found in run_ranks(ranks, continued, folder, texts, ranks, branches):
        assert [t.tolist() for t in found] == [t.tolist() for t in wanted]


def refusal(folder: Path, ids: Tensor) -> str:
    with pytest.raises(UserError) as refused:
        cached_model(folder, initialize(1), 1).prefill(ids)
    return str(refused.value)


def test_prompts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "m")
    expected = "prompts of 5 x 11 tokens; there is room for 4 x 40"
    assert run_ranks(1, refusal, folder, prompts(5)) == [expected]


def runners_of(
    folder: Path,
    runtime: Runtime,
    drops: list[str],
    collectives: Sequence[str] = ("full",),
    branches: int | None = None,
) -> dict[str, Runner]:
    reader = CheckpointReader(folder)
    plain = SPDPlan.dense(reader.base_model(), branches or runtime.tp_size)
    runners: dict[str, Runner] = {}
    for variant in make_variants(plain, drops, collectives):
        model = load_model(reader, variant.plan, runtime, torch.float32)
        if runners:
            share_weights(model, runners[PLAIN].model.model)
        cached = CachedModel(model, VOCABULARY, max_batch=2, max_length=410)
        runners[variant.name] = Runner(cached, variant.plan, variant.silent)
    return runners


def measured(folder: Path, ranks: int) -> dict[str, Any]:
    runtime = initialize(ranks)
    runners = runners_of(folder, runtime, ["attention", "4"])
    found = measure(runners, Workload(2, 11, 3), runtime, rounds=3, recorded_rounds=2)
    return {"figures": found, "link": measure_link(runtime)}


@pytest.mark.parametrize("ranks", [2, 3])
def test_calls_and_bytes_are_the_plans(tmp_path: Path, ranks: int) -> None:
    folder = make_llama(tmp_path / "m", **SHAPE)
    answers = run_ranks(ranks, measured, folder, ranks)
    figures = answers[0]["figures"]
    kept = {PLAIN: 6, "attention (3) dropped": 3, "4 of 6 dropped": 2, LIMIT: 0}
    for name, calls in kept.items():
        for phase, tokens in (("first_token", 22), ("next_token", 2)):
            one = getattr(figures[name], phase)
            entered = calls * tokens * 48 * 4
            assert (one.traffic.calls, one.traffic.num_bytes) == (calls, entered), (name, phase)
            assert one.traffic.sent == pytest.approx(2 * (ranks - 1) / ranks * entered)
            assert len(one.seconds) == 3
            assert min(one.seconds) > 0
            parts = one.breakdown
            assert len(parts.blocks) == 3
            assert all(min(p.compute, p.communication, p.wait) > -1e-9 for p in parts.blocks)
            between = parts.total.communication + parts.total.wait
            assert (between > 0) == (calls > 0)
    assert figures[PLAIN].first_token.breakdown.outside.communication > 0  # embedding, output layer
    # Every rank has the same answer.
    assert all(a["figures"] == figures and a["link"] == answers[0]["link"] for a in answers)
    assert answers[0]["link"].seconds_per_call > 0


def measured_inside_branches(folder: Path) -> dict[str, Any]:
    """Two branches of two ranks each."""
    runtime = initialize(4)
    runners = runners_of(folder, runtime, ["attention", "4"], branches=2)
    found = measure(runners, Workload(2, 11, 3), runtime, rounds=1, recorded_rounds=1)
    return {name: m.first_token.traffic for name, m in found.items()}


def test_calls_inside_branches_are_counted_by_themselves(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "m", **{**SHAPE, "kv": 4})
    found = run_ranks(4, measured_inside_branches, folder)[0]
    kept = {PLAIN: (6, 0), "attention (3) dropped": (3, 3), "4 of 6 dropped": (2, 4), LIMIT: (0, 0)}
    message = 22 * 48 * 4
    for name, (across, inside) in kept.items():
        # In an all-reduce a rank of four sends 1.5 times the message, one of two once.
        wanted = (
            across,
            across * message,
            across * 1.5 * message,
            inside,
            inside * message,
            inside * message,
        )
        assert dataclasses.astuple(found[name]) == pytest.approx(wanted), name


def low_bit_traffic(folder: Path) -> dict[str, tuple[int, int, float]]:
    runtime = initialize(2)
    runners = runners_of(folder, runtime, ["none", "attention"], ["full", "int4:g32"])
    found = measure(runners, Workload(1, 400, 2), runtime, rounds=1, recorded_rounds=1)
    phases = {
        f"{n}, {p}": getattr(m, p).traffic for n, m in found.items() for p in ("first_token", "next_token")
    }
    return {name: (t.calls, t.num_bytes, t.sent) for name, t in phases.items()}


def test_low_bit_points_make_two_smaller_calls(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "m", **SHAPE)
    answers = run_ranks(2, low_bit_traffic, folder)
    assert answers[0] == answers[1]
    found, values = answers[0], 400 * 48
    assert found["plain, first_token"] == (6, 6 * 4 * values, 6 * 4 * values)
    # Two chunks go in and one of them is sent; then the sum of one chunk goes in and is sent.
    sent = exchanged_bytes(values, 2, CollectiveFormat.parse("int4:g32"))
    assert sent < 4 * values / 4  # a full all-reduce sends 4 bytes of each value
    assert found["int4:g32, first_token"] == (12, 6 * 1.5 * sent, 6 * sent)
    assert found["attention (3) dropped + int4:g32, first_token"] == (6, 3 * 1.5 * sent, 3 * sent)
    # A single token is below the size from which low-bit messages pay.
    assert found["int4:g32, next_token"] == found["plain, next_token"] == (6, 6 * 4 * 48, 6 * 4 * 48)


def mismatch(folder: Path) -> str:
    """The plain model under a plan that it was not built for."""
    runtime = initialize(2)
    plain = runners_of(folder, runtime, ["none"])[PLAIN]
    other = Runner(plain.model, plain.plan.with_drops([2]))
    with pytest.raises(RuntimeError) as error:
        measure({"wrong": other}, Workload(1, 4, 2), runtime, rounds=1, recorded_rounds=1)
    return str(error.value)


def test_collectives_that_are_not_the_plans_are_an_error(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "m", **SHAPE)
    assert "wrong, block 1: the plan asks for" in run_ranks(2, mismatch, folder)[0]


def alone(folder: Path) -> int:
    """Rank 0 runs the limit while the other rank does nothing."""
    runtime = initialize(2)
    limit = runners_of(folder, runtime, ["none"])[LIMIT]
    if runtime.rank > 0:
        return 0
    with limit.quiet():
        tokens = limit.model.decode(limit.model.prefill(prompts(2)))
    return len(tokens)


def test_the_limit_needs_no_other_rank(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "m", **SHAPE)
    assert run_ranks(2, alone, folder, timeout=30) == [2, 0]


def replaced_and_restored() -> list[bool]:
    runtime = initialize(2)
    before = (dist.all_reduce, mappings.dist_all_gather_func)
    tensor = torch.full((3,), float(runtime.rank + 1))
    with silenced():
        dist.all_reduce(tensor, group=runtime.tp_group)
    untouched = tensor.tolist() == [runtime.rank + 1.0] * 3
    with recorded([], WallClock()) as recording:
        dist.all_reduce(tensor, group=runtime.tp_group)
        out = torch.empty(6)
        mappings.dist_all_gather_func(out, tensor, group=runtime.tp_group)
    seen = [(c.name, c.num_bytes, c.block) for c in recording.calls]
    with pytest.raises(KeyError), silenced():
        raise KeyError
    return [
        untouched,
        out.tolist() == [3.0] * 6,
        seen == [("all_reduce", 12, None), ("all_gather_into_tensor", 12, None)],
        before == (dist.all_reduce, mappings.dist_all_gather_func),
    ]


def test_collectives_are_replaced_inside_the_context_only() -> None:
    assert run_ranks(2, replaced_and_restored) == [[True] * 4] * 2
