"""Models with experts: what the suite of all families (test_families.py) does not ask."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_spd.calibration.stream import model_shape
from megatron_spd.checkpoint.hf import CheckpointReader
from megatron_spd.comm.routing import routing_bytes
from megatron_spd.evaluate.generate import load_for_generation
from megatron_spd.models.build import build_gpt_model
from megatron_spd.runtime.distributed import initialize
from tests.distributed.test_collectives import Counter
from tests.distributed.test_families import (
    DROPPED,
    EXTRAS,
    MEGATRON_BOUND,
    TRANSFORMERS_BOUND,
    assert_close,
    full_logits,
    megatron_result,
    relative_error,
    wanted,
)
from tests.families import make_model, token_ids
from tests.models import make_export
from tests.ranks import run_ranks

Make = Callable[[str, int, str], Path]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Make:
    root = tmp_path_factory.mktemp("experts")

    def make(case: str, branches: int, routing: str) -> Path:
        plain, out = root / case, root / f"{case} {branches} {routing}"
        if not plain.exists():
            make_model(case, plain)
        if not out.exists():
            make_export(plain, out, branches, DROPPED, **EXTRAS, routing=routing)
        return out

    return make


@pytest.mark.parametrize("case", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize(("branches", "ranks"), [(4, 1), (2, 2), (4, 2)])
def test_the_first_branch_may_route_for_all(folder: Make, case: str, branches: int, ranks: int) -> None:
    path = folder(case, branches, "first")
    expected = wanted(case, path)
    assert_close(run_ranks(ranks, megatron_result, path, ranks)[0], expected, MEGATRON_BOUND)
    shipped = load_for_generation(path, torch.float64)(token_ids()).logits
    assert relative_error(shipped, expected["logits"]) < TRANSFORMERS_BOUND
    # Who routes matters on this model, so that equal results say something.
    own = wanted(case, folder(case, branches, "branch"))["logits"]
    assert relative_error(own, expected["logits"]) > 0.05


def collectives(path: Path) -> tuple[list[int], list[int]]:
    """Bytes of the broadcasts of a forward pass of the blocks on two ranks, and of the all-reduces backward."""
    runtime, reader = initialize(2), CheckpointReader(path)
    assert reader.plan is not None
    model = build_gpt_model(
        model_shape(reader), reader.plan, reader.block, reader.get, runtime, torch.float32
    )
    with Counter() as forward:
        out = full_logits(model, token_ids())
    with Counter() as backward:
        out.sum().backward()
    assert {name for name, _ in backward} == {"all_reduce"}
    return [size for name, size in forward if name == "broadcast"], [size for _, size in backward]


def test_what_one_routing_decision_costs(folder: Make) -> None:
    """Where branches see different inputs of the MLP (a dropped attention point, a shift, a branch norm) their choice
    crosses ranks: one small broadcast, and backward one all-reduce of the weights' gradients."""
    tokens, chosen = token_ids().numel(), 2
    assert routing_bytes(tokens, chosen, 4) == tokens * chosen * 6
    runs = {r: run_ranks(2, collectives, folder("mixtral", 2, r))[0] for r in ("branch", "first")}
    # Attention points 0 and 2 are dropped; block 2 has all its attention's output when its experts are chosen.
    assert runs["branch"][0] == []
    assert runs["first"][0] == [routing_bytes(tokens, chosen, 4)] * 2
    gradients = tokens * chosen * 4
    extra = sorted(runs["first"][1])
    for size in runs["branch"][1]:
        extra.remove(size)
    assert extra == [gradients] * 2
