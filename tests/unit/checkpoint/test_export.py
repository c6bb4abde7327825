"""An export as its users meet it: a folder that loads with torch and transformers alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from megatron_spd.checkpoint.export import export
from megatron_spd.checkpoint.hf import CheckpointReader
from megatron_spd.checkpoint.remote_code.modeling_spd import SPDLlamaForCausalLM
from megatron_spd.errors import CheckpointError, PlanError, UserError
from megatron_spd.plan import SPDPlan
from tests.models import LLAMA3_ROPE, make_export, make_llama

#: Run by a Python that cannot import this package: load, compute, generate, save, load what was saved.
STRANGER = """
import sys
sys.modules["megatron_spd"] = sys.modules["megatron"] = None
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
folder, again, result = sys.argv[1:]
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
ids = tokenizer("Every rank holds some of the heads.", return_tensors="pt")["input_ids"]
with torch.no_grad():
    logits = model(ids).logits
text = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
model.save_pretrained(again)
reloaded = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)
with torch.no_grad():
    assert torch.equal(reloaded(ids).logits, logits)
assert reloaded.config.spd_plan == config.spd_plan
torch.save({"ids": ids, "logits": logits, "text": text, "class": type(model).__module__}, result)
"""


def run_stranger(folder: Path, tmp_path: Path) -> dict[str, Any]:
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    arguments = [str(folder), str(tmp_path / "again"), str(tmp_path / "result.pt")]
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return torch.load(tmp_path / "result.pt")


@pytest.mark.parametrize("tied", [True, False])
def test_loads_where_this_package_is_not(tmp_path: Path, tied: bool) -> None:
    make_llama(tmp_path / "base", tied=tied, biases=True, rope_scaling=LLAMA3_ROPE)
    out = make_export(
        tmp_path / "base", tmp_path / "out", 2, [0, 1, 4], [(1, "attention")], norms=[(0, "mlp"), (2, "mlp")]
    )
    result = run_stranger(out, tmp_path)
    assert "transformers_modules" in result["class"]
    ours = SPDLlamaForCausalLM.from_pretrained(out)
    with torch.no_grad():
        assert torch.equal(ours(result["ids"]).logits, result["logits"])
    expected = ours.generate(
        result["ids"], attention_mask=torch.ones_like(result["ids"]), max_new_tokens=5, do_sample=False
    )
    assert torch.equal(result["text"], expected)


def test_a_loader_without_the_code_refuses(tmp_path: Path) -> None:
    out = make_export(make_llama(tmp_path / "base"), tmp_path / "out", 2, [0])
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(out, trust_remote_code=False)
    config = json.loads((out / "config.json").read_text())
    del config["auto_map"]
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="spd_llama"):
        AutoModelForCausalLM.from_pretrained(out, trust_remote_code=False)


def test_what_lies_in_the_folder(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base", max_shard_size="20KB")
    out = make_export(base, tmp_path / "out", 2, [0, 3], [(1, "mlp")])
    assert sorted(file.name for file in out.iterdir()) == [
        "config.json",
        "configuration_spd.py",
        "generation_config.json",
        "model.safetensors",
        "modeling_spd.py",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "spd_llama"
    assert config["architectures"] == ["SPDLlamaForCausalLM"]
    assert config["spd_branches"] == 2
    plan = SPDPlan.from_dict(config["spd_plan"])
    assert plan.dropped == [0, 3]
    plan.check_model(CheckpointReader(base).fingerprint(), str(base))
    changed = {"model_type", "architectures", "auto_map", "spd_branches", "spd_plan"}
    plain = json.loads((base / "config.json").read_text())
    assert {k: v for k, v in config.items() if k not in changed} == {
        k: v for k, v in plain.items() if k not in changed
    }


def test_weights_are_stored_under_their_names_in_the_base_dtype(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base", dtype=torch.bfloat16, tied=False)
    reader = CheckpointReader(base)
    plan = SPDPlan.dense(reader.base_model(), 2).with_drops([2])
    plan = plan.with_block(1, mlp_shift=True, attention_norm=True)
    own = {
        "mlp.spd_shift": torch.ones(2, 32),
        "self_attn.spd_norm_weight": torch.full((2, 32), 2.0),
        "self_attn.spd_norm_bias": torch.full((2, 32), 3.0),
    }

    def blocks(i: int) -> dict[str, Tensor]:
        """Computed in float32 and negated: what is stored must come from here."""
        weights = {name: -tensor.float() for name, tensor in reader.block(i).items()}
        return weights | (own if i == 1 else {})

    export(reader, plan, blocks, tmp_path / "out", max_shard_bytes=20_000)
    stored = {k: v for file in (tmp_path / "out").glob("*.safetensors") for k, v in load_file(file).items()}
    for name, tensor in own.items():
        assert torch.equal(stored.pop(f"model.layers.1.{name}"), tensor.bfloat16())
    assert sorted(stored) == sorted(reader.names())
    for name, tensor in stored.items():
        original = reader.get(name)
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, -original if "layers" in name else original)
    assert CheckpointReader(tmp_path / "out").plan == plan


def test_blocks_are_asked_for_once_and_in_order(tmp_path: Path) -> None:
    reader = CheckpointReader(make_llama(tmp_path / "base"))
    asked: list[int] = []

    def blocks(i: int) -> dict[str, Tensor]:
        asked.append(i)
        return reader.block(i)

    export(reader, SPDPlan.dense(reader.base_model(), 2).with_drops([0]), blocks, tmp_path / "out")
    assert asked == [0, 1, 2]


def test_an_export_that_drops_nothing_is_the_base_model(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base")
    out = make_export(base, tmp_path / "out", 2, [])
    ids = torch.arange(3, 20)[None]
    logits = SPDLlamaForCausalLM.from_pretrained(out)(ids).logits
    assert torch.equal(logits, LlamaForCausalLM.from_pretrained(base)(ids).logits)


# ---- what is refused ------------------------------------------------------------------------------------------


def test_plan_of_another_model(tmp_path: Path) -> None:
    reader = CheckpointReader(make_llama(tmp_path / "base"))
    other = CheckpointReader(make_llama(tmp_path / "other", seed=1))
    plan = SPDPlan.dense(other.base_model(), 2)
    with pytest.raises(PlanError, match="made for the model with fingerprint"):
        export(reader, plan, reader.block, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_export_of_an_export(tmp_path: Path) -> None:
    reader = CheckpointReader(make_export(make_llama(tmp_path / "base"), tmp_path / "out", 2, [0]))
    assert reader.plan is not None
    with pytest.raises(CheckpointError, match="is an SPD export already"):
        export(reader, reader.plan, reader.block, tmp_path / "out2")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mlp.spd_shift": torch.ones(2, 32)}, r"\['mlp.spd_shift'\] are missing or not in the plan"),
        ({"self_attn.spd_shift": None}, r"\['self_attn.spd_shift'\] are missing"),
        ({"self_attn.spd_shift": torch.ones(3, 32)}, r"has shape \[3, 32\], expected \[2, 32\]"),
        ({"self_attn.spd_norm_bias": torch.ones(2, 32)}, r"\['self_attn.spd_norm_bias'\] are missing or not"),
        ({"mlp.spd_norm_bias": None}, r"\['mlp.spd_norm_bias'\] are missing"),
        ({"mlp.spd_norm_weight": torch.ones(2, 48)}, r"has shape \[2, 48\], expected \[2, 32\]"),
        ({"mlp.up_proj.weight": torch.ones(24, 32)}, r"has shape \[24, 32\], expected \[48, 32\]"),
        ({"mlp.up_proj.weight": torch.full((48, 32), torch.nan)}, "mlp.up_proj.weight holds NaN"),
    ],
)
def test_block_that_is_not_what_the_plan_says(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    reader = CheckpointReader(make_llama(tmp_path / "base"))
    plan = SPDPlan.dense(reader.base_model(), 2).with_drops([0])
    plan = plan.with_block(1, attention_shift=True, mlp_norm=True)
    own = ("self_attn.spd_shift", "mlp.spd_norm_weight", "mlp.spd_norm_bias")

    def blocks(i: int) -> dict[str, Tensor]:
        if i != 1:
            return reader.block(i)
        weights = reader.block(i) | {name: torch.ones(2, 32) for name in own} | change
        return {name: tensor for name, tensor in weights.items() if tensor is not None}

    with pytest.raises(CheckpointError, match=words):
        export(reader, plan, blocks, tmp_path / "out")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["base"]


def test_output_folder_that_holds_something_else(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base")
    out = make_export(base, tmp_path / "out", 2, [0])
    with pytest.raises(UserError, match="already holds something else"):
        make_export(base, out, 2, [2])
    assert CheckpointReader(out).plan.dropped == [0]


@pytest.mark.parametrize("before_branch_norms", [False, True])
def test_the_same_plan_again_replaces_the_export(tmp_path: Path, before_branch_norms: bool) -> None:
    base = make_llama(tmp_path / "base")
    out = make_export(base, tmp_path / "out", 2, [0], [(0, "mlp")], seed=1)
    if before_branch_norms:
        config = json.loads((out / "config.json").read_text())
        for block in config["spd_plan"]["blocks"]:
            del block["attention_norm"], block["mlp_norm"]
        (out / "config.json").write_text(json.dumps(config))
    first = CheckpointReader(out).fingerprint()
    make_export(base, out, 2, [0], [(0, "mlp")], seed=2)
    assert CheckpointReader(out).fingerprint() != first
    assert sorted(file.name for file in tmp_path.iterdir()) == ["base", "out"]
