"""What vLLM says to options that do not fit an export, with the plug-in and without."""

from __future__ import annotations

from typing import Any

import pytest

from tests.families import make_model
from tests.models import make_export, make_llama
from tests.serving.processes import NEEDS_VLLM, SMALL, environment, run_program

pytestmark = NEEDS_VLLM

#: Options ("model": one of the fixture's, default "dropped") and a part of the message, none where the options fit.
CASES: list[tuple[dict[str, Any], str]] = [
    ({"tensor_parallel_size": 1}, ""),
    ({"tensor_parallel_size": 2}, ""),
    ({"tensor_parallel_size": 4}, ""),
    ({"tensor_parallel_size": 8}, ""),
    (
        {"tensor_parallel_size": 3},
        "M = 3 ranks cannot run a plan of G = 4 branches; M may be one of [1, 2, 4, 8, 12, 24]",
    ),
    ({"tensor_parallel_size": 6}, "M = 6 ranks cannot run a plan of G = 4 branches"),
    ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size > 1 does not work with an SPD model"),
    ({"enable_lora": True}, "--enable-lora does not work with an SPD model"),
    (
        {"tensor_parallel_size": 2, "quantization": "experts_int8"},
        "quantized weights need one rank for each of the G = 4 branches, but M = 2",
    ),
    ({"model": "low_bit", "enable_lora": True}, "--enable-lora does not work with an SPD model"),
    ({"model": "plain", "enable_lora": True}, ""),
    ({"model": "experts"}, ""),
    (
        {"model": "experts", "tensor_parallel_size": 4},
        "experts with M = 4 ranks for G = 2 branches are not supported; serve with --tensor-parallel-size 2 or less",
    ),
    (
        {"model": "experts", "tensor_parallel_size": 2, "enable_expert_parallel": True},
        "--enable-expert-parallel does not work with an SPD model",
    ),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Exports: one point dropped; all kept, one of them low-bit; all kept; with experts."""
    folder = tmp_path_factory.mktemp("models")
    base = make_llama(folder / "base", hidden=96, heads=24, kv=24, layers=2, ffn=96, head_dim=32)
    mixtral = make_model("mixtral", folder / "mixtral", max_position_embeddings=256)
    made = {
        "dropped": make_export(base, folder / "dropped", 4, [0]),
        "low_bit": make_export(base, folder / "low_bit", 4, [], low_bit={1: "int8"}),
        "plain": make_export(base, folder / "plain", 4, []),
        "experts": make_export(mixtral, folder / "experts", 2, [0]),
    }
    return {name: str(path) for name, path in made.items()}


@pytest.fixture(scope="module")
def answer(models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("program")
    dropped = models["dropped"]
    cases = [SMALL | options | {"model": models[options.get("model", "dropped")]} for options, _ in CASES]
    request = {"with": cases, "without": [SMALL | {"model": dropped}], "again": dropped}
    return run_program("options_program", request, folder, environment(1), 600)


def test_options_are_checked_before_anything_starts(answer: dict[str, Any]) -> None:
    for message, (options, expected) in zip(answer["with"], CASES, strict=True):
        assert expected in message if expected else message == "", (options, message)
    # The package's own class, not the code in the export's folder.
    config = "megatron_spd.checkpoint.remote_code.configuration_spd.SPDLlamaConfig"
    assert answer["config"] == config


def test_without_the_plug_in_the_export_is_refused(answer: dict[str, Any]) -> None:
    assert "trust_remote_code=True" in answer["without"][0]
