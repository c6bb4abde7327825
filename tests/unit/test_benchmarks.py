"""The benchmarks run, compare equal work, and print ratios. How fast anything is, is not asserted here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_spd.calibration.text import read_text, token_batches
from megatron_spd.checkpoint.hf import CheckpointReader
from megatron_spd.evaluate.generate import load_for_generation
from tests.families import make_model
from tests.models import make_export, make_llama

BENCHMARKS = Path(__file__).parents[2] / "tools" / "benchmarks"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("m") / "m")


def start(name: str, model: Path, *options: str, threads: bool = True) -> subprocess.CompletedProcess[str]:
    sizes = ["--sequences", "4", "--seq-length", "8", *(["--threads", "1"] if threads else []), "--json"]
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), "--model", str(model), *sizes, *options]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, env=env)


def measured(name: str, model: Path, *options: str) -> dict[str, Any]:
    """The JSON object that the benchmark prints last, its ratios checked."""
    done = start(name, model, "--branches", "2", *options)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    result = json.loads(lines[-1])
    assert result["ratio"] == result["comparisons"][0]["ratio"]
    for comparison in result["comparisons"]:
        assert 0 < comparison["ratio_low"] <= comparison["ratio"] <= comparison["ratio_high"]
        assert any(
            comparison["name"] in line and f"ratio {comparison['ratio']:.3f}" in line for line in lines[:-1]
        )
    return result


def test_sweep(model: Path) -> None:
    result = measured("sweep", model, "--repeats", "1", "--candidates", "3", "--micro-batch", "3")
    assert result["target"] == 0.55
    # Three blocks: from the first, second or third on, or nowhere are attention points dropped.
    assert (result["candidates"], result["candidates_measured"]) == (4, 3)
    assert result["perplexities"] == pytest.approx(result["reference_perplexities"], rel=1e-4)
    assert len(set(result["perplexities"])) == 3


def test_distill_step(model: Path) -> None:
    result = measured("distill_step", model, "--repeats", "2", "--steps", "2", "--micro-batch-size", "2")
    assert result["target"] == 1.25
    ours, reference = result["first_losses"]
    assert ours == pytest.approx(reference, rel=1e-5)
    assert ours > 0


def test_layer(model: Path) -> None:
    result = measured("layer", model, "--repeats", "2", "--clock", "cpu")
    assert result["target"] == 1.03
    assert result["largest_difference"] < 1e-4
    targets = {c["name"]: c["target"] for c in result["comparisons"]}
    assert targets == {
        "G = 1, forward": 1.03,
        "G = 1, forward + backward": 1.03,
        "G = 2, forward": None,
        "G = 2, forward + backward": None,
    }


def test_error_map(model: Path, tmp_path: Path) -> None:
    # Three blocks; the second's attention point and its MLP point are dropped: the third reads what is pending.
    export = make_export(model, tmp_path / "spd", 2, [2, 3])
    done = map_errors(export, model)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    first, second, third = result["blocks"]
    assert first["error"] < 1e-9 < min(second["error"], third["error"])
    assert [b["dropped"] for b in result["blocks"]] == [[], ["attention", "mlp"], []]
    assert sum(result["branches"]) == pytest.approx(1)
    # Averaged over all positions it is the divergence of transformers' logits.
    lengths = [p["to"] - p["from"] + 1 for p in result["positions"]]
    mean = sum(n * p["kl"] for n, p in zip(lengths, result["positions"], strict=True)) / sum(lengths)
    assert sum(lengths) == 23
    assert mean == pytest.approx(divergence(export, model, 4, 24), rel=1e-4)


def map_errors(spd: Path, plain: Path) -> subprocess.CompletedProcess[str]:
    folders = ["--model", str(spd), "--against", str(plain)]
    command = [
        sys.executable,
        str(BENCHMARKS / "error_map.py"),
        *folders,
        "--sequences",
        "4",
        "--seq-length",
        "24",
    ]
    return subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=280, check=False)


def divergence(export: Path, plain: Path, sequences: int, length: int) -> float:
    """KL(plain || export) in nats per scored position, from the logits of transformers' models."""
    tokens = token_batches(CheckpointReader(plain).tokenizer(), read_text(None), sequences, length)
    with torch.no_grad():
        mine, theirs = (
            load_for_generation(folder)(tokens).logits[:, :-1].double().log_softmax(-1)
            for folder in (export, plain)
        )
    return float((theirs.exp() * (theirs - mine)).sum(-1).mean())


def test_routing(tmp_path: Path) -> None:
    experts = make_model("mixtral", tmp_path / "m")
    done = start("routing", experts, "--branches", "2", "--seq-length", "24", threads=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["bytes"] == {"routing": 2 * 6, "all-reduce": 48 * 4}
    assert len(result["blocks"]) == 3
    assert all(0 < block["branch"] != block["first"] > 0 for block in result["blocks"])
    for routing, kl in result["kl"].items():
        export = make_export(experts, tmp_path / routing, 2, [0, 2, 4], routing=routing)
        assert kl == pytest.approx(divergence(export, experts, 4, 24), rel=1e-4)


@pytest.mark.timeout(620)
def test_a_model_larger_than_its_limit_goes_through_every_step(tmp_path: Path) -> None:
    sizes = ["--hidden", "512", "--ffn", "2048", "--layers", "40", "--folder", str(tmp_path)]
    limit = ["--limit", "0.24", "--beyond-libraries", "--whole", "--json"]
    command = [sys.executable, str(BENCHMARKS / "memory.py"), *sizes, *limit]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["model_bytes"] > 1.3 * result["limit"]
    sensitivity, grouping, calibration, distillation, export, whole = result["steps"]
    assert sensitivity["candidates"] == 40
    assert sorted(grouping["kv_group_order"]) == [0, 1, 2, 3]
    assert "original" in calibration["candidates"]["heads"]
    assert len(calibration["candidates"]["heads"]) > 1
    assert any("neurons" in name for name in calibration["candidates"]["mlp"])
    assert distillation["blocks"] == [1]
    assert export["bytes"] > result["model_bytes"]
    assert not whole["ok"]
    assert not list(tmp_path.iterdir())


def test_a_mistake_is_one_line(model: Path) -> None:
    done = start("layer", model, "--branches", "3")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("layer.py: error: G = 3 branches do not divide")
    assert "Traceback" not in done.stderr
    done = map_errors(model, model)
    assert done.returncode == 2
    assert f"{model} is a plain model; give an SPD export" in done.stderr.splitlines()[-1]
