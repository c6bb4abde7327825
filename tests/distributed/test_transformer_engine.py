"""The spec of Transformer Engine modules: refused without it; on a stand-in of plain PyTorch, the same function,
gradients, marks and checkpoint keys as the spec of local modules."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_spd.errors import UserError
from megatron_spd.layers.spec import block_submodules, get_gpt_layer_spd_spec
from megatron_spd.models import build
from megatron_spd.models.build import transformer_config
from megatron_spd.runtime.distributed import initialize
from tests.distributed.block_cases import Case, _model_shape, build_case, megatron_result, reference_result
from tests.ranks import run_ranks
from tests.transformer_engine import transformer_engine_in_pytorch

#: Every block is an SPD layer: attention dropped, MLP dropped and pending, everything, shifts, branch norms.
CASE = Case(2, 4, (0, 1, 2, 4, 5, 6), kv_groups=6, shifts=(1, 2), norms=(2, 4))


def with_transformer_engine(function: Any, *args: Any) -> Any:
    """``function(*args)``, its blocks built by the spec of Transformer Engine modules."""
    asked = functools.partial(block_submodules, use_transformer_engine=True)
    with transformer_engine_in_pytorch(), mock.patch.object(build, "block_submodules", asked):
        return function(*args)


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        (2, {}),
        (2, {"biases": True, "gated": False}),
        (2, {"biases": True, "sequence_parallel": True, "length": 8}),
        (4, {"biases": True, "kv_groups": 12}),
    ],
    ids=["gated", "biases", "sequence parallel", "M > G"],
)
def test_it_computes_the_formula(ranks: int, changes: dict[str, Any]) -> None:
    if ranks > CASE.branches:
        changes = changes | {"shifts": (), "norms": ()}
    case = dataclasses.replace(CASE, **changes)
    got = run_ranks(ranks, with_transformer_engine, megatron_result, case, ranks, timeout=120)[0]
    wanted = reference_result(case)
    assert set(got) == set(wanted)
    errors = {n: float((got[n] - w).norm() / w.norm().clamp_min(1e-12)) for n, w in wanted.items()}
    assert all(error < 1e-5 for error in errors.values()), errors


def described(case: Case) -> dict[str, Any]:
    """Classes and marked parameters of the first layer, and what a checkpoint calls its tensors."""
    layer = build_case(case, initialize(2)).blocks.layers[0]
    marks = {}
    for name, parameter in layer.named_parameters():
        sharded = getattr(parameter, "tensor_model_parallel", False)
        marks[name] = {
            "sharded": (parameter.partition_dim, parameter.partition_stride) if sharded else False,
            "partial gradient": getattr(parameter, "sequence_parallel", False),
            "reduced over all replicas": getattr(parameter, "allreduce", True),
        }
    saved = layer.sharded_state_dict("layers.")
    keys = {t.key: getattr(t, "global_shape", None) for t in saved.values() if hasattr(t, "key")}
    classes = {type(m).__name__ for m in layer.modules()}
    return {"marks": marks, "keys": keys, "classes": classes}


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_marks_and_checkpoint_keys_are_those_of_the_local_spec(sequence_parallel: bool) -> None:
    overrides = {"sequence_parallel": sequence_parallel, "perform_initialization": True}
    case = dataclasses.replace(CASE, biases=True, overrides=overrides)
    got = run_ranks(2, with_transformer_engine, described, case)
    wanted = run_ranks(2, described, case)
    assert {"TEBranchColumnParallelLinear", "TEPartialRowParallelLinear", "TEDotProductAttention"} <= got[0][
        "classes"
    ]
    assert not {name for name in got[0]["classes"] if name.startswith("TE")} & wanted[0]["classes"]
    for ours, local in zip(got, wanted, strict=True):
        assert ours["marks"] == local["marks"]
        assert ours["keys"] == local["keys"]


def refusal(case: Case, ranks: int, present: bool, changes: dict[str, Any]) -> str:
    config = transformer_config(_model_shape(case), initialize(1), torch.float32)
    config = dataclasses.replace(config, tensor_model_parallel_size=ranks)
    fused = changes.pop("fused_attention", False)
    for name, value in changes.items():
        setattr(config, name, value)

    def ask() -> str:
        try:
            get_gpt_layer_spd_spec(config, case.plan(), fused, use_transformer_engine=True)
        except UserError as error:
            return str(error)
        return ""

    if not present:
        return ask()
    with transformer_engine_in_pytorch():
        return ask()


@pytest.mark.parametrize(
    ("ranks", "present", "changes", "message"),
    [
        (2, False, {}, "Transformer Engine is not installed; install transformer-engine"),
        (1, True, {}, "M = 1 ranks are fewer than G = 2 branches; use M >= G"),
        (2, True, {"fused_attention": True}, "fused_attention"),
        (2, True, {"tp_comm_overlap": True}, "tp_comm_overlap"),
        (2, True, {"layernorm_zero_centered_gamma": True}, "layernorm_zero_centered_gamma"),
        (2, True, {"num_moe_experts": 4, "moe_aux_loss_coeff": 0}, "num_moe_experts"),
    ],
)
def test_refusals(ranks: int, present: bool, changes: dict[str, Any], message: str) -> None:
    (answer,) = run_ranks(1, refusal, CASE, ranks, present, changes)
    assert message in answer
    assert "\n" not in answer
