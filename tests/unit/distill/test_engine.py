"""The DeepSpeed configuration that the recipe makes, and the mistakes it refuses."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_spd.distill.engine import EngineSettings, deepspeed_config
from megatron_spd.errors import UserError

SETTINGS = EngineSettings(1e-3, 4, 2, 1.0, 0.0, 0.1, 0, "fp32")


def with_file(tmp_path: Path, content: Any, **changes: Any) -> EngineSettings:
    path = tmp_path / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return dataclasses.replace(SETTINGS, config_file=str(path), **changes)


def test_options_fill_the_config() -> None:
    config = deepspeed_config(SETTINGS, 100)
    assert config["train_micro_batch_size_per_gpu"] == 4
    assert config["gradient_accumulation_steps"] == 2
    assert config["optimizer"]["params"]["lr"] == 1e-3
    assert config["scheduler"]["params"]["total_num_steps"] == 100
    assert config["scheduler"]["params"]["warmup_num_steps"] == 10


def test_a_file_wins_where_it_speaks(tmp_path: Path) -> None:
    file = {
        "gradient_accumulation_steps": 8,
        "train_micro_batch_size_per_gpu": "auto",
        "optimizer": {"params": {"betas": [0.9, 0.999]}},
        "zero_optimization": {"stage": 2},
        "scheduler": None,
    }
    config = deepspeed_config(with_file(tmp_path, file), 100)
    assert config["gradient_accumulation_steps"] == 8
    assert config["train_micro_batch_size_per_gpu"] == 4
    assert config["optimizer"]["params"]["betas"] == [0.9, 0.999]
    assert config["optimizer"]["params"]["lr"] == 1e-3
    assert config["zero_optimization"]["stage"] == 2
    assert "scheduler" not in config


def test_another_optimizer_replaces_ours_but_gets_the_rate(tmp_path: Path) -> None:
    file = {"optimizer": {"type": "SGD", "params": {"momentum": 0.9}}}
    config = deepspeed_config(with_file(tmp_path, file), 100)
    assert config["optimizer"] == {"type": "SGD", "params": {"lr": 1e-3, "momentum": 0.9}}


@pytest.mark.parametrize(
    "name", ["zero0_fp32", "zero1_fp32", "zero1_bf16", "zero2_bf16", "zero3_fp32", "zero3_bf16"]
)
def test_the_shipped_files_are_accepted(name: str) -> None:
    path = Path(__file__).parents[3] / "launch" / "ds_config" / f"{name}.json"
    stage, dtype = int(name[4]), name.split("_")[1]
    settings = dataclasses.replace(SETTINGS, config_file=str(path), dtype=dtype)
    config = deepspeed_config(settings, 10)
    assert config["zero_optimization"]["stage"] == stage
    assert config["bf16"]["enabled"] == (dtype == "bf16")
    assert config["optimizer"]["params"]["lr"] == 1e-3


@pytest.mark.parametrize(
    ("content", "changes", "message"),
    [
        ("{", {}, "is not JSON"),
        ([1], {}, "an object was expected"),
        ({"zero_optimization": {"stage": 4}}, {}, "the stages are 0, 1, 2 and 3"),
        ({}, {"dtype": "bf16"}, "use --zero-stage 1, 2 or 3"),
        ({"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}}, {}, "make them agree"),
    ],
)
def test_mistakes(tmp_path: Path, content: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        deepspeed_config(with_file(tmp_path, content, **changes), 10)


def test_a_missing_file() -> None:
    with pytest.raises(UserError, match="no DeepSpeed config at nowhere"):
        deepspeed_config(dataclasses.replace(SETTINGS, config_file="nowhere.json"), 10)
