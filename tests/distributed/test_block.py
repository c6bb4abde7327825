"""The Megatron layer against the plain float64 formula: output, input gradient, every weight gradient."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_spd.comm import lowbit
from megatron_spd.models.llama import LLAMA
from megatron_spd.models.weights import initial_branch_tensors
from megatron_spd.runtime.distributed import initialize
from tests.distributed.block_cases import Case, build_case, megatron_result, reference_result
from tests.ranks import run_ranks
from tests.reference import blocks_forward

FP32_BOUND = 1e-5
#: Shrinking a failure would run hundreds of distributed cases.
PHASES = (Phase.explicit, Phase.generate)


def relative_error(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-12))


def check(case: Case, ranks: int, bound: float = FP32_BOUND) -> None:
    got = run_ranks(ranks, megatron_result, case, ranks)[0]
    wanted = reference_result(case)
    assert set(got) == set(wanted)
    errors = {name: relative_error(got[name], wanted[name]) for name in wanted}
    bad = {name: error for name, error in errors.items() if not error < bound}
    assert not bad, f"{case} on {ranks} ranks: {bad}"


SCHEDULES = {
    "all kept": (),
    "attention dropped (the SPD block)": (0, 2, 4),
    "mlp dropped": (1, 3),
    "both dropped in one block": (0, 1),
    "everything dropped": (0, 1, 2, 3, 4, 5),
    "run over two blocks": (1, 2, 3),
    "first and last attention": (0, 4),
}


@pytest.mark.parametrize("dropped", SCHEDULES.values(), ids=SCHEDULES.keys())
@pytest.mark.parametrize(
    ("branches", "ranks"), [(1, 1), (3, 1), (2, 2), (4, 2), (3, 3), (4, 4), (1, 2), (1, 3), (2, 4)]
)
def test_every_kind_of_schedule(dropped: tuple[int, ...], branches: int, ranks: int) -> None:
    check(Case(branches, 3, dropped, heads=12, kv_groups=12), ranks)


VARIANTS = {
    "biases": {"biases": True},
    "shifts": {"shifts": (1, 2, 3)},
    "biases and shifts": {"biases": True, "shifts": (1, 2, 3)},
    "branch norms": {"norms": (0, 1, 2, 3, 5)},
    "branch norms, biases and shifts": {"norms": (0, 2, 3), "biases": True, "shifts": (1, 2, 3)},
    "branch norms and recompute": {"norms": (1, 2), "recompute": True, "shifts": (1,)},
    "plain mlp": {"gated": False, "biases": True},
    "recompute": {"recompute": True, "biases": True, "shifts": (2,)},
    "dropout": {"dropout": 0.3, "biases": True},
    "dropout and recompute": {"dropout": 0.3, "recompute": True, "biases": True},
    "selective recompute": {"overrides": {"recompute_granularity": "selective"}},
    "one recomputed run of blocks": {
        "overrides": {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 3,
        }
    },
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize(("branches", "ranks"), [(6, 1), (6, 2), (3, 3), (2, 4)])
def test_every_variant(variant: dict, branches: int, ranks: int) -> None:
    check(dataclasses.replace(Case(branches, 3, (0, 1, 2, 4), heads=12), **variant), ranks)


@pytest.mark.parametrize(("branches", "ranks", "kv_groups"), [(6, 1, 6), (6, 2, 6), (3, 3, 6), (2, 4, 4)])
def test_grouped_queries(branches: int, ranks: int, kv_groups: int) -> None:
    check(Case(branches, 3, (0, 1, 2, 4), heads=12, kv_groups=kv_groups), ranks)


@pytest.mark.parametrize("dropped", SCHEDULES.values(), ids=SCHEDULES.keys())
@pytest.mark.parametrize(("branches", "ranks"), [(3, 1), (2, 2), (4, 2), (3, 3), (4, 4), (1, 3), (2, 4)])
def test_branch_norms_under_every_schedule(dropped: tuple[int, ...], branches: int, ranks: int) -> None:
    check(Case(branches, 3, dropped, norms=(0, 1, 2, 3, 4, 5), shifts=(0, 3)), ranks)


def neutral_norms(case: Case, with_them: bool) -> dict[str, Tensor]:
    """Output and gradients of ``case``, its branch norms as they start, or without any."""
    runtime = initialize(2)
    unit = build_case(case if with_them else dataclasses.replace(case, norms=()), runtime)
    for i, weights in enumerate(case.weights()):
        extra = case.plan().blocks[i]
        start = initial_branch_tensors(extra, LLAMA, case.branches, case.hidden, torch.float32)
        unit.load_block(i, weights | start)
    x, up = (t.float() for t in case.data())
    out = unit(x.requires_grad_())
    out.backward(up)
    grads = {n: p.grad for n, p in unit.named_parameters() if p.grad is not None}
    return {"out": out.detach(), "x": x.grad, **grads}


@pytest.mark.parametrize("branches", [2, 4])
def test_branch_norms_start_where_they_change_nothing(branches: int) -> None:
    case = Case(branches, 3, (0, 1, 2, 4), shifts=(1,), norms=(0, 1, 2, 3, 4, 5))
    with_them, without = (run_ranks(2, neutral_norms, case, given)[0] for given in (True, False))
    own = {name for name in with_them if "_norm_" in name}
    assert len(own) == 12
    assert set(without) == set(with_them) - own
    assert torch.equal(with_them["out"], without["out"])
    for name, wanted in without.items():
        # Sums over a rank's branches are made in another order.
        assert relative_error(with_them[name], wanted) < FP32_BOUND, name
    # They are trained from there.
    assert all(with_them[name].abs().max() > 0 for name in own)


def low_bit_result(case: Case, ranks: int) -> dict[str, Tensor]:
    """:func:`megatron_result` with every message low-bit, however small."""
    usual = lowbit.lowbit_all_reduce.__defaults__
    lowbit.lowbit_all_reduce.__defaults__ = (0,)
    try:
        return megatron_result(case, ranks)
    finally:
        lowbit.lowbit_all_reduce.__defaults__ = usual


#: Float64, so that hardly any value falls on the other side of a step (rotary angles are float32).
LOW_BIT = {"dtype": "float64", "shifts": (1, 2), "biases": True}


@pytest.mark.parametrize(("branches", "ranks"), [(2, 2), (3, 1), (3, 3), (4, 2), (2, 4)])
@pytest.mark.parametrize("collective", ["int8:g8", "int4:g8"])
def test_low_bit_points(branches: int, ranks: int, collective: str) -> None:
    same = 0
    for dropped in SCHEDULES.values():
        case = Case(branches, 3, dropped, collective=collective, **LOW_BIT)
        got = run_ranks(ranks, low_bit_result, case, ranks)[0]
        # One process computes what a rank for each branch would get.
        wanted = reference_result(case, branches if ranks == 1 else ranks)
        exact = reference_result(dataclasses.replace(case, collective="full"))
        assert set(got) == set(wanted)
        errors = {name: relative_error(got[name], wanted[name]) for name in wanted}
        effects = {name: relative_error(exact[name], wanted[name]) for name in wanted}
        assert effects["out"] > 1e-3
        # A value that falls on the other side of a step takes up to half of the effect of all roundings with it.
        assert all(errors[name] < 2e-6 + 0.5 * effects[name] for name in wanted), (dropped, errors, effects)
        same += all(error < 2e-6 for error in errors.values())
    assert same >= len(SCHEDULES) // 2


@pytest.mark.parametrize(("branches", "ranks"), [(3, 1), (3, 3), (4, 2), (2, 4)])
def test_the_gradients_of_a_low_bit_sum_are_those_of_the_plain_one(branches: int, ranks: int) -> None:
    """Where nothing reads the rounded sum, the gradients do not know of it."""
    case = Case(branches, 1, (0,), collective="int4:g8", **LOW_BIT)
    got = run_ranks(ranks, low_bit_result, case, ranks)[0]
    exact = reference_result(dataclasses.replace(case, collective="full"))
    assert relative_error(got.pop("out"), exact.pop("out")) > 1e-3
    for name in exact:
        assert relative_error(got[name], exact[name]) < 2e-6, name


@st.composite
def cases(draw: st.DrawFn, branches: int, ranks: int) -> Case:
    layers = draw(st.integers(1, 4))
    points = st.integers(0, 2 * layers - 1)
    return Case(
        branches=branches,
        layers=layers,
        dropped=tuple(sorted(draw(st.sets(points)))),
        kv_groups=draw(st.sampled_from([k for k in (12, 6, 4, 3, 2) if k % max(branches, ranks) == 0])),
        gated=draw(st.booleans()),
        biases=draw(st.booleans()),
        shifts=tuple(sorted(draw(st.sets(points)))),
        norms=tuple(sorted(draw(st.sets(points)))),
        dropout=draw(st.sampled_from([0.0, 0.0, 0.2])),
        recompute=draw(st.booleans()),
        # float64, so that the bound does not depend on how the random weights are conditioned (rotary angles
        # are float32).
        dtype="float64",
        seed=draw(st.integers(0, 10**6)),
    )


@pytest.mark.parametrize(("branches", "ranks"), [(2, 1), (2, 2), (6, 3), (3, 3), (4, 4), (2, 4)])
def test_random_schedules(branches: int, ranks: int) -> None:
    @settings(
        max_examples=12,
        deadline=None,
        derandomize=True,
        phases=PHASES,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(cases(branches, ranks))
    def property_holds(case: Case) -> None:
        check(case, ranks, bound=2e-6)

    property_holds()


def _plain_low_precision(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """The formula on one process in ``dtype``: what a plain low-precision run would give."""
    weights = [{n: t.to(dtype).requires_grad_() for n, t in w.items()} for w in case.weights()]
    x, up = (t.to(dtype) for t in case.data())
    x.requires_grad_()
    out = blocks_forward(x, weights, case.shape, case.branches, case.plan().dropped)
    out.backward(up)
    grads = {f"{i}.{n}": t.grad for i, w in enumerate(weights) for n, t in w.items() if t.grad is not None}
    return {"out": out.detach(), "x": x.grad, **grads}


@pytest.mark.parametrize("norms", [(), (0, 1, 2, 3)], ids=["base norms", "branch norms"])
@pytest.mark.parametrize(("branches", "ranks"), [(2, 2), (3, 3), (4, 4), (3, 1)])
def test_bf16_error_is_at_most_twice_that_of_a_plain_bf16_run(
    branches: int, ranks: int, norms: tuple[int, ...]
) -> None:
    case = Case(branches, 3, (0, 1, 2, 4), norms=norms, dtype="bfloat16", seed=3)
    got = run_ranks(ranks, megatron_result, case, ranks)[0]
    wanted, plain = reference_result(case), _plain_low_precision(case, torch.bfloat16)
    for name in wanted:
        allowed = 2 * relative_error(plain[name], wanted[name])
        assert relative_error(got[name], wanted[name]) <= allowed, name


def test_attention_dropout_is_repeated_by_recompute() -> None:
    case = Case(3, 3, (0, 1, 2), overrides={"attention_dropout": 0.4})
    once = run_ranks(3, megatron_result, case, 3)[0]
    again = run_ranks(3, megatron_result, dataclasses.replace(case, recompute=True), 3)[0]
    for name in once:
        assert torch.equal(once[name], again[name]), name
