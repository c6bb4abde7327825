"""The layer spec: stock where nothing is dropped, refusals, sharding in Megatron checkpoints, KV-cache decoding."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_spd.calibration.stream import model_shape
from megatron_spd.checkpoint.hf import CheckpointReader
from megatron_spd.errors import UserError
from megatron_spd.layers.block import SPDTransformerLayer
from megatron_spd.layers.spec import get_gpt_layer_spd_spec
from megatron_spd.models.build import build_gpt_model, transformer_config
from megatron_spd.models.llama import LLAMA
from megatron_spd.runtime.distributed import initialize
from tests.distributed.block_cases import Case, _model_shape, build_case
from tests.models import make_export, make_llama
from tests.ranks import run_ranks

CASE = Case(3, 4, (2, 5))


def layer_kinds(case: Case) -> list[str]:
    unit = build_case(case, initialize(1))
    return [type(layer).__name__ for layer in unit.blocks.layers]


def test_blocks_with_nothing_dropped_or_pending_are_stock() -> None:
    stock, spd = TransformerLayer.__name__, SPDTransformerLayer.__name__
    # Point 2: attention of block 1. Point 5: MLP of block 2, pending in block 3.
    assert run_ranks(1, layer_kinds, CASE) == [[stock, spd, spd, spd]]
    with_norm = dataclasses.replace(CASE, norms=(1,))
    assert run_ranks(1, layer_kinds, with_norm) == [[spd, spd, spd, spd]]


def refusal(case: Case, ranks: int, changes: dict[str, Any]) -> str:
    runtime = initialize(1)
    config = transformer_config(_model_shape(case), runtime, torch.float32)
    config = dataclasses.replace(config, tensor_model_parallel_size=ranks)
    for name, value in changes.items():
        setattr(config, name, value)
    try:
        get_gpt_layer_spd_spec(config, case.plan())
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("ranks", "changes", "message"),
    [
        (2, {}, "M = 2 ranks cannot run a plan of G = 3 branches; M may be one of [1, 3, 6, 12]"),
        (4, {}, "M = 4 ranks"),
        (1, {"num_layers": 5}, "num_layers = 5, the plan is for 4"),
        (1, {"context_parallel_size": 2}, "context_parallel_size = 2: Megatron-core's attention"),
        (1, {"num_moe_experts": 4, "moe_aux_loss_coeff": 0.01}, "moe_aux_loss_coeff"),
        (6, {"num_moe_experts": 4, "moe_aux_loss_coeff": 0}, "experts with M = 6 ranks for G = 3"),
        (1, {"num_moe_experts": 4, "moe_shared_expert_intermediate_size": 8}, "shared_expert"),
        (
            3,
            {"num_moe_experts": 4, "moe_aux_loss_coeff": 0, "sequence_parallel": True},
            "sequence_parallel with exp",
        ),
        (1, {"fp32_residual_connection": True}, "fp32_residual_connection"),
    ],
)
def test_what_does_not_fit_is_refused(ranks: int, changes: dict[str, Any], message: str) -> None:
    assert message in run_ranks(1, refusal, CASE, ranks, changes)[0]


def test_low_bit_points_are_refused_under_sequence_parallelism() -> None:
    case = dataclasses.replace(CASE, collective="int4")
    assert "low-bit sync points" in run_ranks(1, refusal, case, 3, {"sequence_parallel": True})[0]


def branch_sharding(branches: int, ranks: int) -> dict[str, tuple]:
    """Global shape, this rank's offset and copy of every branch tensor of a layer that has all of them."""
    from megatron.core import parallel_state

    unit = build_case(Case(branches, 1, (0,), shifts=(0, 1), norms=(0, 1)), initialize(ranks))
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    sharded = unit.blocks.layers[0].sharded_state_dict(metadata=metadata)
    tensors = {entry.name: sharded[entry.name] for entry in LLAMA.branch_tensors}
    return {name: (t.global_shape, t.global_offset, t.replica_id) for name, t in tensors.items()}


def test_branch_tensors_are_sharded_over_branches_in_megatron_checkpoints() -> None:
    for rank, sharded in enumerate(run_ranks(2, branch_sharding, 4, 2)):
        assert sharded == {entry.name: ((4, 16), (2 * rank, 0), (0, 0, 0)) for entry in LLAMA.branch_tensors}
    for rank, sharded in enumerate(run_ranks(4, branch_sharding, 2, 4)):
        place = ((2, 16), (rank // 2, 0), (0, rank % 2, 0))
        assert sharded == {entry.name: place for entry in LLAMA.branch_tensors}


def decoded(folder: Path, ids: Tensor, ranks: int) -> tuple[Tensor, Tensor]:
    """Logits of all positions at once; those of the last position of a prefill of half of them and of every
    single step after it, with a KV cache."""
    runtime = initialize(ranks)
    reader = CheckpointReader(folder)
    assert reader.plan is not None
    shape = model_shape(reader)
    model = build_gpt_model(shape, reader.plan, reader.block, reader.get, runtime, torch.float32).eval()
    length = ids.shape[1]
    mask = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]
    positions = torch.arange(length).expand_as(ids)
    with torch.no_grad():
        at_once = model(ids, positions, mask, runtime_gather_output=True)
        context, parts, start = StaticInferenceContext(len(ids), length), [], 0
        for stop in range(length // 2, length + 1):
            part = slice(start, stop)
            parts.append(
                model(
                    ids[:, part],
                    positions[:, part],
                    mask[:, :, part, :stop],
                    inference_context=context,
                    runtime_gather_output=True,
                )
            )
            context.increment_sequence_len_offset(stop - start)
            start = stop
    return at_once, torch.cat([part[:, -1:] for part in parts], 1)


@pytest.mark.parametrize(("branches", "ranks", "kv"), [(3, 1, 6), (3, 3, 6), (2, 4, 4)])
def test_kv_cache_decoding_equals_full_recompute(tmp_path: Path, branches: int, ranks: int, kv: int) -> None:
    base = make_llama(tmp_path / "m", hidden=48, heads=12, kv=kv, ffn=48)
    folder = make_export(
        base, tmp_path / "x", branches, (0, 1, 2), [(1, "attention")], norms=[(0, "mlp"), (1, "attention")]
    )
    ids = torch.randint(0, 300, (2, 12), generator=torch.Generator().manual_seed(0))
    at_once, stepwise = run_ranks(ranks, decoded, folder, ids, ranks)[0]
    assert stepwise.shape[1] == 7
    assert (stepwise - at_once[:, -7:]).abs().max() < 1e-4
