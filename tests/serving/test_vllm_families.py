"""Every family but Llama, which the other files are about: vLLM's tokens are those of the export in transformers."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_spd.errors import UserError
from megatron_spd.plan import ROUTINGS, Routing
from tests.families import make_model
from tests.models import make_export
from tests.serving.cases import NEW
from tests.serving.processes import NEEDS_VLLM, generate, transformers_tokens

pytestmark = NEEDS_VLLM

#: vLLM's attention on a CPU takes heads of 32 channels; its Qwen2 and OPT share the hidden size out over the heads.
SIZES = {"hidden_size": 256, "max_position_embeddings": 256}
OWN = {"opt": {"word_embed_proj_dim": 256}}
PROMPTS = [[5, 17, 100, 42, 9], [250], list(range(30, 85))]


def test_what_vllms_model_would_leave_out_is_refused() -> None:
    from megatron_spd.serving.vllm.checks import check_model

    for bias in False, True:
        config = SimpleNamespace(model_type="spd_qwen3", attention_bias=bias)
        with pytest.raises(UserError, match="no bias behind its attention") if bias else nullcontext():
            check_model(config)


@pytest.mark.parametrize(
    ("case", "ranks"), [("opt", 2), ("mistral with a window", 1), ("qwen2", 1), ("qwen3", 1)]
)
def test_several_branches_on_a_rank(tmp_path: Path, case: str, ranks: int) -> None:
    base = make_model(case, tmp_path / "plain", **SIZES, **OWN.get(case, {"head_dim": 32}))
    model = make_export(
        base, tmp_path / "spd", 4, [0, 2, 3, 5], shifts=[(0, "mlp")], norms=[(2, "attention")]
    )
    expected = transformers_tokens(model, PROMPTS, NEW)
    assert expected != transformers_tokens(base, PROMPTS, NEW)
    assert generate(model, ranks, [PROMPTS], NEW, tmp_path)["tokens"] == [expected]


@pytest.mark.parametrize(
    ("case", "branches", "routing"), [("mixtral with a window", 4, "first"), ("qwen3_moe", 2, "branch")]
)
def test_experts_on_two_ranks(tmp_path: Path, case: str, branches: int, routing: Routing) -> None:
    """Every pair of inputs, the same for all branches or not, and outputs, summed or not, that differs from vLLM's."""
    base = make_model(case, tmp_path / "plain", **SIZES, head_dim=32)
    texts = {}
    for chosen in ROUTINGS:
        model = make_export(
            base,
            tmp_path / chosen,
            branches,
            [0, 1, 3],
            shifts=[(2, "mlp")],
            norms=[(0, "mlp")],
            routing=chosen,
        )
        texts[chosen] = transformers_tokens(model, PROMPTS, NEW)
    assert texts["first"] != texts["branch"]
    assert generate(tmp_path / routing, 2, [PROMPTS], NEW, tmp_path)["tokens"] == [texts[routing]]
