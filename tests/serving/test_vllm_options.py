"""What vLLM says to options that do not fit an export, with the plug-in and without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.models import make_export, make_llama
from tests.serving.processes import NEEDS_VLLM, SMALL, environment, run_program

pytestmark = NEEDS_VLLM

#: Options, and a part of the message; no message where the options fit.
CASES: list[tuple[dict[str, Any], str]] = [
    ({"tensor_parallel_size": 1}, ""),
    ({"tensor_parallel_size": 2}, ""),
    ({"tensor_parallel_size": 4}, ""),
    (
        {"tensor_parallel_size": 3},
        "M = 3 ranks cannot run a plan of G = 4 branches; M may be one of [1, 2, 4]",
    ),
    (
        {"tensor_parallel_size": 8},
        "M = 8 ranks cannot run a plan of G = 4 branches; M may be one of [1, 2, 4]",
    ),
    ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size > 1 does not work with an SPD model"),
    ({"enable_lora": True}, "--enable-lora does not work with an SPD model"),
    (
        {"tensor_parallel_size": 2, "quantization": "experts_int8"},
        "quantized weights need one rank for each of the G = 4 branches, but M = 2",
    ),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    base = make_llama(folder / "plain", hidden=96, heads=24, kv=24, layers=2, ffn=96, head_dim=32)
    return make_export(base, folder / "spd", 4, [0])


def test_options_are_checked_before_anything_starts(model: Path, tmp_path: Path) -> None:
    cases = [{"model": str(model), **SMALL, **options} for options, _ in CASES]
    answer = run_program(
        "options_program", {"cases": cases, "again": str(model)}, tmp_path, environment(1), 200
    )
    for message, (options, expected) in zip(answer["messages"], CASES, strict=True):
        assert expected in message if expected else message == "", (options, message)
    # The package's own class, not the code in the export's folder.
    config = "megatron_spd.checkpoint.remote_code.configuration_spd_llama.SPDLlamaConfig"
    assert answer["config"] == config


def test_without_the_plug_in_the_export_is_refused(model: Path, tmp_path: Path) -> None:
    cases = [{"model": str(model), **SMALL}]
    answer = run_program("options_program", {"cases": cases}, tmp_path, environment(1, VLLM_PLUGINS=""), 100)
    assert "trust_remote_code=True" in answer["messages"][0]
