"""vLLM generates the tokens of the exported model in transformers, for every kind of schedule and of M and G."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_spd.checkpoint.prepare import prepare
from tests.models import make_export, make_llama
from tests.serving.processes import NEEDS_VLLM, generate, transformers_tokens

pytestmark = NEEDS_VLLM

NEW = 8
#: The third is prefilled in several chunks; the fourth shares more than one cache block with it.
LONG = [(7 * i) % 300 + 3 for i in range(150)]
PROMPTS = [[5, 17, 100, 42, 9], [250], LONG, [*LONG[:100], 8, 9]]

#: Block 0: attention dropped, with a shift and a branch norm behind it. Block 1: MLP dropped, behind a shift. Blocks 2
#: to 4: a run of dropped points through whole blocks, with shifts and norms in it. Block 5: as vLLM has it. Block 6: a
#: shift and norms where nothing is pending. Block 7: attention and the last point, which is synced in any case.
LAYERS = 8
DROPPED = [0, 3, 4, 5, 6, 7, 8, 14, 15]
SHIFTS = [(0, "mlp"), (1, "mlp"), (2, "attention"), (4, "attention"), (6, "attention")]
NORMS = [(0, "mlp"), (3, "attention"), (4, "mlp"), (6, "mlp")]


def export(folder: Path, branches: int, **model: Any) -> Path:
    """A random model's export with every kind of schedule, at ``folder/spd``."""
    base = make_llama(folder / "plain", layers=LAYERS, ffn=96, head_dim=32, **model)
    return make_export(base, folder / "spd", branches, DROPPED, shifts=SHIFTS, norms=NORMS)


def check(model: Path, ranks: int, folder: Path) -> None:
    """Both rounds give transformers' tokens; the second one from the prefix cache."""
    expected = transformers_tokens(model, PROMPTS, NEW)
    # Otherwise equality would say nothing of the plan.
    assert all(
        a != b for a, b in zip(expected, transformers_tokens(folder / "plain", PROMPTS, NEW), strict=True)
    )
    found = generate(model, ranks, [PROMPTS, PROMPTS], NEW, folder)
    assert found["tokens"] == [expected, expected]
    assert found["cached"][1][2] >= 128


@pytest.mark.parametrize("ranks", [1, 3])
def test_one_branch_or_all_on_a_rank(tmp_path: Path, ranks: int) -> None:
    check(export(tmp_path, 3, hidden=96, heads=6, kv=3, biases=True), ranks, tmp_path)


def test_two_branches_on_each_of_two_ranks(tmp_path: Path) -> None:
    check(export(tmp_path, 4, hidden=128, heads=8, kv=4, tied=False), 2, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(480)
def test_smollm2(tmp_path: Path) -> None:
    """The real model with half of its attention points and a third of its MLP points dropped."""
    base = tmp_path / "plain"
    prepare("smollm2-135m", base)
    model = make_export(base, tmp_path / "spd", 3, [*range(10, 40, 2), *range(21, 31, 3), 43, 45])
    prompts = [[504, 4421, 282, 253, 1418], list(range(1000, 1100))]
    expected = transformers_tokens(model, prompts, NEW)
    for ranks in 1, 3:
        assert generate(model, ranks, [prompts], NEW, tmp_path, timeout=200)["tokens"] == [expected]
