"""The dry run: sizes against transformers' own models, work against counted operations, mistakes, and every recipe."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from megatron_spd.cli import main
from megatron_spd.config import DryRunOptions, RunOptions
from megatron_spd.errors import UserError
from megatron_spd.parsing import parse_options
from megatron_spd.scale.dry_run import dry_run
from megatron_spd.scale.setup import Setup
from megatron_spd.scale.size import TABLE, model_size
from megatron_spd.scale.work import stage_work
from megatron_spd.sensitivity.sweep import _candidates
from tests.models import llama_config

MODELS: dict[str, dict[str, Any]] = json.loads(TABLE.read_text())
RECIPES = sorted((Path(__file__).parents[3] / "examples").glob("*/run.yaml"))


def options(*given: str) -> DryRunOptions:
    return parse_options(DryRunOptions, ["--dry-run", *given], "test")


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_of_transformers(name: str) -> None:
    given = {k: v for k, v in MODELS[name].items() if k != "torch_dtype"}

    def count(layers: int) -> int:
        with torch.device("meta"):
            config = AutoConfig.for_model(**(given | {"num_hidden_layers": layers}))
            return sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())

    one, block = count(1), count(2) - count(1)
    size = model_size(name)
    assert size.block == block
    assert size.parameters == one + (size.layers - 1) * block


def test_the_known_totals() -> None:
    billions = {name: round(model_size(name).parameters / 1e9, 2) for name in MODELS}
    assert billions["llama2-70b"] == 68.98
    assert billions["llama3.1-405b"] == 405.85
    assert billions["mixtral-8x7b"] == 46.70


def test_forward_operations_are_those_that_are_computed() -> None:
    config = llama_config(64, 4, 2, layers=1, ffn=96, tied=False)
    config._attn_implementation = "eager"
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 32, dtype=torch.long))
    size = model_size_of(config.to_dict())
    # Eager attention computes the masked half of the scores too.
    masked = 2.0 * 32 * size.heads * size.head_dim
    assert counter.get_total_flops() == 32 * (size.forward_flops(32) + masked + size.head_flops)


def model_size_of(config: dict[str, Any]) -> Any:
    from megatron_spd.scale.size import _from_config

    return _from_config("test", config)


@pytest.mark.parametrize("which", ["attention", "mlp", "any"])
def test_the_sweep_passes_as_many_blocks_as_it_counts(which: str) -> None:
    given = ["--config", "llama2-7b", "--branches", "8", "--ranks", "8", "--sync-points", which]
    setup = Setup.of(options(*given, "--recovery", "zs"))
    method = "algorithm1" if which == "attention" else "single"
    steps = _candidates(32, method, which, []).steps(32)
    size, tokens = setup.size, setup.measured_tokens
    scored = (1 + setup.droppable) * size.head_flops
    wanted = (steps * size.forward_flops(256) + scored) * tokens / 8
    assert stage_work(setup)["sensitivity"].flops == pytest.approx(wanted)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.parent.name)
def test_recipes(path: Path) -> None:
    """Each is taken by the command run, and its stages fit the hardware that its README names."""
    name, readme = path.parent.name, (path.parent / "README.md").read_text()
    parse_options(RunOptions, ["--config", str(path), "--model", "m", "--out", "o"], "test")
    hardware = re.search(r"--hardware (\S+)", readme)
    given = ["--config", name, "--recipe", str(path)]
    result = dry_run(options(*given, "--hardware", hardware[1] if hardware else "cpu"))
    assert result["fits"] is None or all(result["fits"].values()), result["fits"]
    if hardware:
        assert name == "smollm2-135m" or f"--config {name} --recipe examples/{name}/run.yaml" in readme
        launched = re.search(r"--ranks (\d+) --tensor-parallel (\d+)", readme)
        assert launched
        two = dry_run(
            options(*given, "--nodes", "2", "--ranks", launched[1], "--tensor-parallel", launched[2])
        )
        assert two["setup"]["replicas"] == 16 // result["setup"]["branches"]


def test_every_known_model_has_a_recipe() -> None:
    assert {p.parent.name for p in RECIPES} == set(MODELS)


def test_text_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(MODELS["llama2-70b"]))
    given = ["--branches", "8", "--ranks", "8", "--dtype", "bf16", "--zero-stage", "1"]
    assert main(["plan", "--dry-run", "--config", "llama2-70b", *given]) == 0
    text = capsys.readouterr().out
    assert "does not fit a100-80gb (80 GB): finishing" in text
    assert "time (estimate)" in text
    assert main(["plan", "--dry-run", "--config", str(file), *given, "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [s["stage"] for s in result["stages"]][:3] == ["sensitivity", "search", "calibration"]
    for stage in result["stages"]:
        memory = stage["memory"]
        assert sum(memory["parts"].values()) == memory["device"] + memory["host"]
    # The plain weights once for the sweep, twice for export.
    export = result["stages"][-1]
    assert export["bytes_read"] == export["bytes_written"] == 2 * 68976648192


def test_more_ranks_take_less_and_times_follow_the_rates() -> None:
    given = ["--config", "llama2-7b", "--branches", "8", "--recovery", "zs"]
    one, eight = (dry_run(options(*given, "--ranks", ranks))["stages"][0] for ranks in ("1", "8"))
    assert one["memory"]["device"] > eight["memory"]["device"]
    assert one["flops"] == pytest.approx(8 * eight["flops"])
    assert one["seconds"]["communication"] == 0 < eight["seconds"]["communication"]
    slow = dry_run(options(*given, "--ranks", "8", "--disk-rate", "1", "--efficiency", "0.2"))["stages"][0]
    for name in ("compute", "disk"):
        assert slow["seconds"][name] == pytest.approx(2 * eight["seconds"][name])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--config", "llama9-1b", "--branches", "2"], "no model config 'llama9-1b'; known are llama2-7b, "),
        (["--config", "llama2-7b", "--branches", "3"], "G = 3 branches do not divide"),
        (["--config", "llama2-7b", "--branches", "8", "--ranks", "3"], "M = 3 ranks cannot run"),
        (
            ["--config", "llama2-7b", "--branches", "8", "--ranks", "8", "--nodes", "3"],
            "--nodes 3 do not divide",
        ),
        (["--config", "llama2-7b", "--branches", "8", "--efficiency", "0"], "--efficiency is 0.0"),
    ],
)
def test_mistakes(given: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--dry-run", *given]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "holds a list"),
        ('{"model_type": "gpt9"}', "model_type 'gpt9'; sizes are known for llama"),
        ('{"model_type": "llama", "hidden_size": "x"}', "hidden_size is 'x'"),
    ],
)
def test_wrong_configs(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "config.json"
    file.write_text(content)
    with pytest.raises(UserError, match=message):
        model_size(str(file))
