"""A plain model and its export beside each other, each in an engine of one rank: their text and their latencies."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_spd.serving.latency import FIGURES
from tests.serving.cases import LOW_BIT, NEW, PROMPTS, export
from tests.serving.processes import (
    NEEDS_VLLM,
    ROOT,
    SMALL,
    environment,
    run_program,
    transformers_tokens,
)

TOOL = ROOT / "tools" / "benchmark_vllm.py"
LOADS = ["--prompt-tokens", "5", "70", "--requests", "1", "3", "--new-tokens", "4", "--repeats", "2"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One rank sends nothing, so that low-bit points change nothing there."""
    folder = tmp_path_factory.mktemp("models")
    spd = export(folder, 3, LOW_BIT, hidden=96, heads=6, kv=3, biases=True)
    return [folder / "plain", spd]


@pytest.fixture(scope="module")
def answer(models: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of ``benchmark_program``; the prompts are asked twice."""
    engine = ["--enforce-eager", "--engine-args", json.dumps(SMALL)]
    arguments = ["--models", *map(str, models), *LOADS, "--rest", "0", *engine]
    request = {"arguments": arguments, "rounds": [PROMPTS, PROMPTS], "new_tokens": NEW}
    folder = tmp_path_factory.mktemp("program")
    # The engines are two: each takes the core that is free.
    env = environment(1, VLLM_CPU_OMP_THREADS_BIND="nobind", OMP_NUM_THREADS="1")
    return run_program("benchmark_program", request, folder, env, 400)


@NEEDS_VLLM
def test_text(answer: dict[str, Any], models: list[Path]) -> None:
    """Both rounds give transformers' tokens; the second one from the prefix cache."""
    plain, spd = (transformers_tokens(model, PROMPTS, NEW) for model in models)
    # Otherwise equality would say nothing of the plan.
    assert all(a != b for a, b in zip(plain, spd, strict=True))
    assert [text["tokens"] for text in answer["text"]] == [[plain, plain], [spd, spd]]
    assert all(text["cached"][1][2] >= 128 for text in answer["text"])


@NEEDS_VLLM
def test_benchmark(answer: dict[str, Any], models: list[Path]) -> None:
    found = answer["benchmark"]
    assert (found["ranks"], found["repeats"]) == (1, 2)
    loads = [(load["prompt_tokens"], load["requests"], load["new_tokens"]) for load in found["loads"]]
    assert loads == [(5, 1, 4), (5, 3, 4), (70, 1, 4), (70, 3, 4)]
    for load in found["loads"]:
        plain, spd = load["models"]
        assert [plain["model"], spd["model"]] == list(map(str, models))
        assert [plain["architecture"], spd["architecture"]] == ["LlamaForCausalLM", "SPDLlamaForCausalLM"]
        assert all(set(plain[name]["ratios"].values()) == {1.0} for name in FIGURES)
        for name in FIGURES:
            for spread in spd[name].values():
                assert 0 < spread["low"] <= spread["median"] <= spread["high"]


@NEEDS_VLLM
@pytest.mark.parametrize("figure", ["first_token", "between_tokens"])
def test_latencies_are_those_that_vllm_counts(answer: dict[str, Any], figure: str) -> None:
    own, counted = answer["counted"][figure]
    assert own == pytest.approx(counted, rel=1e-6)
    assert own > 0


@NEEDS_VLLM
def test_nothing_is_generated_faster_than_by_the_latencies(answer: dict[str, Any]) -> None:
    """Those that vLLM counts, of the same request."""
    (rate, tokens), (_, first), (_, between) = (
        answer["counted"][name] for name in ("tokens_per_second", "first_token", "between_tokens")
    )
    assert tokens / rate > 0.9 * (first + (tokens - 1) * between)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--new-tokens", "1"], "new-tokens 1: the first three must be at least 1, new-tokens at least 2"),
        (["--repeats", "0"], "prompt-tokens 128, requests 1, repeats 0, new-tokens 32"),
        (["--requests", "2", "0"], "prompt-tokens 128, requests 0, repeats 10"),
    ],
)
def test_what_measures_nothing_is_refused(options: list[str], message: str) -> None:
    command = [sys.executable, str(TOOL), "--models", "nowhere", *options]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, env=environment(1)
    )
    assert done.returncode == 2
    assert done.stderr.startswith("benchmark_vllm.py: error: ")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
