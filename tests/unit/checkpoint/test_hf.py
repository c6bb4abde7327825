"""Reading Hugging Face folders: what is found, and one clear line for each kind of bad one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_spd.checkpoint.hf import CheckpointReader
from megatron_spd.errors import CheckpointError, PlanError, UserError
from tests.models import LLAMA3_ROPE, make_export, make_llama, tiny_text


def edit_config(folder: Path, **changes: Any) -> None:
    """Change fields of config.json; ``None`` removes one."""
    config = json.loads((folder / "config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("shards", ["1GB", "20KB"], ids=["single file", "shards"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("biases", [True, False])
def test_reads_what_transformers_reads(tmp_path: Path, shards: str, tied: bool, biases: bool) -> None:
    make_llama(tmp_path, tied=tied, biases=biases, max_shard_size=shards)
    reader = CheckpointReader(tmp_path)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    if tied:
        expected.pop("lm_head.weight")
    assert sorted(reader.names()) == sorted(expected)
    for name, tensor in expected.items():
        assert torch.equal(reader.get(name), tensor)
        assert reader.shape(name) == tuple(tensor.shape)
        assert reader.dtype(name) == torch.float32
    blocks = {
        reader.family.block_name(i, name): tensor
        for i in range(3)
        for name, tensor in reader.block(i).items()
    }
    assert blocks.keys() == {name for name in expected if name.startswith("model.layers.")}
    assert reader.tied is tied
    assert reader.head_dim == 8
    assert reader.plan is None


def test_a_tensor_belongs_to_the_caller(tmp_path: Path) -> None:
    reader = CheckpointReader(make_llama(tmp_path))
    reader.get("model.norm.weight").zero_()
    assert float(reader.get("model.norm.weight").abs().sum()) > 0


def test_duplicate_output_layer_and_rotary_buffers_are_ignored(tmp_path: Path) -> None:
    make_llama(tmp_path, tied=True)

    def add(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    def seen() -> tuple[list[str], str]:
        reader = CheckpointReader(tmp_path)
        return sorted(reader.names()), reader.fingerprint()

    before = seen()
    edit_tensors(tmp_path, add)
    assert seen() == before


def test_base_model(tmp_path: Path) -> None:
    base = CheckpointReader(make_llama(tmp_path, 48, 6, 3, 2, 96)).base_model()
    assert (base.num_layers, base.hidden_size, base.intermediate_size) == (2, 48, 96)
    assert (base.num_attention_heads, base.num_key_value_heads, base.model_type) == (6, 3, "llama")


def test_an_export_names_its_base_model(tmp_path: Path) -> None:
    base = CheckpointReader(make_llama(tmp_path / "base"))
    out = make_export(tmp_path / "base", tmp_path / "out", 2, [0, 3], [(1, "mlp")], norms=[(2, "attention")])
    exported = CheckpointReader(out)
    assert exported.base_model() == base.base_model()
    assert exported.plan is not None
    assert exported.plan.dropped == [0, 3]
    assert exported.block(1)["mlp.spd_shift"].shape == (2, 32)
    assert "mlp.spd_shift" not in exported.block(0)
    own = {name for name in exported.block_names(2) if "spd" in name}
    assert own == {"self_attn.spd_norm_weight", "self_attn.spd_norm_bias"}
    assert exported.fingerprint() != base.fingerprint()


# ---- fingerprint ----------------------------------------------------------------------------------------------


def test_fingerprint_does_not_depend_on_shards_or_config_style(tmp_path: Path) -> None:
    one = make_llama(tmp_path / "one", rope_scaling=LLAMA3_ROPE)
    two = make_llama(tmp_path / "two", rope_scaling=LLAMA3_ROPE, max_shard_size="20KB")
    edit_config(
        two,
        rope_parameters=None,
        rope_theta=10000.0,
        rope_scaling=LLAMA3_ROPE,
        transformers_version="4.40.0",
    )
    assert CheckpointReader(one).fingerprint() == CheckpointReader(two).fingerprint()


def test_fingerprint_tells_models_apart(tmp_path: Path) -> None:
    first = make_llama(tmp_path / "first")
    prints = [CheckpointReader(first).fingerprint()]
    prints.append(CheckpointReader(make_llama(tmp_path / "seed", seed=1)).fingerprint())
    prints.append(CheckpointReader(make_llama(tmp_path / "dtype", dtype=torch.bfloat16)).fingerprint())
    prints.append(CheckpointReader(make_llama(tmp_path / "rope", rope_theta=5e5)).fingerprint())
    edit_config(first, rms_norm_eps=1e-6)
    prints.append(CheckpointReader(first).fingerprint())

    def nudge(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.2.mlp.down_proj.weight"] *= 1.001

    edit_tensors(first, nudge)
    prints.append(CheckpointReader(first).fingerprint())
    assert len(set(prints)) == len(prints)


# ---- tokenizer ------------------------------------------------------------------------------------------------


def test_tokenizer_of_plain_and_exported_folder(tmp_path: Path) -> None:
    make_llama(tmp_path / "base")
    make_export(tmp_path / "base", tmp_path / "out", 2, [0])
    for folder in ("base", "out"):
        tokenizer = CheckpointReader(tmp_path / folder).tokenizer()
        assert tokenizer.decode(tokenizer(tiny_text(5))["input_ids"]) == tiny_text(5)


def test_no_tokenizer(tmp_path: Path) -> None:
    reader = CheckpointReader(make_llama(tmp_path, with_tokenizer=False))
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        reader.tokenizer()


# ---- bad folders ----------------------------------------------------------------------------------------------


def remove(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def pop(name: str) -> Callable[[Path], object]:
    return lambda folder: edit_tensors(folder, lambda tensors: tensors.pop(name))


def put(name: str, tensor: Tensor) -> Callable[[Path], object]:
    return lambda folder: edit_tensors(folder, lambda tensors: tensors.__setitem__(name, tensor))


def config(**changes: Any) -> Callable[[Path], object]:
    return lambda folder: edit_config(folder, **changes)


BAD_FOLDERS = {
    "missing folder": (shutil.rmtree, "no model folder at"),
    "empty folder": (
        lambda folder: [file.unlink() for file in folder.iterdir()],
        "has no config.json; give a Hugging Face folder",
    ),
    "no weights": (remove("model.safetensors"), "has no weights"),
    "config no JSON": (lambda folder: (folder / "config.json").write_text("{"), "config.json is not JSON"),
    "config no object": (lambda folder: (folder / "config.json").write_text("[1]"), "expected a JSON object"),
    "unknown family": (config(model_type="gpt2"), "model_type 'gpt2'; the known families are"),
    "no family": (config(model_type=None), "model_type None; the known families are"),
    "no layer count": (config(num_hidden_layers=None), "num_hidden_layers is None"),
    "bad head count": (config(num_attention_heads="4"), "num_attention_heads is '4'"),
    "groups do not divide heads": (config(num_key_value_heads=3), "num_key_value_heads = 3 does not divide"),
    "bad eps": (config(rms_norm_eps=-1.0), "rms_norm_eps is -1.0"),
    "other activation": (config(hidden_act="gelu"), "hidden_act = 'gelu'"),
    "quantised": (config(quantization_config={"quant_method": "gptq"}), "is quantised"),
    "truncated": (truncate, "model.safetensors is truncated or damaged: it has"),
    "only a stub": (lambda folder: (folder / "model.safetensors").write_bytes(b"abc"), "is truncated or no"),
    "not safetensors": (
        lambda folder: (folder / "model.safetensors").write_bytes(bytes([4, 0, 0, 0, 0, 0, 0, 0]) + b"junk"),
        "no valid safetensors header",
    ),
    "missing block tensor": (
        pop("model.layers.1.mlp.up_proj.weight"),
        "lacks tensor model.layers.1.mlp.up_proj.weight of shape [48, 32]",
    ),
    "missing embedding": (pop("model.embed_tokens.weight"), "lacks tensor model.embed_tokens.weight"),
    "untied without output layer": (config(tie_word_embeddings=False), "lacks tensor lm_head.weight"),
    "biases promised": (config(attention_bias=True), "lacks tensor model.layers.0.self_attn.q_proj.bias"),
    "fewer layers than tensors": (config(num_hidden_layers=2), "which its config.json does not account for"),
    "foreign tensor": (
        put("model.layers.0.self_attn.q_norm.weight", torch.ones(8)),
        "has tensor model.layers.0.self_attn.q_norm.weight, which",
    ),
    "wrong shape": (
        put("model.layers.2.self_attn.o_proj.weight", torch.ones(32, 31)),
        "model.layers.2.self_attn.o_proj.weight in {file} has shape [32, 31], config.json asks for [32, 32]",
    ),
    "wrong dtype": (put("model.norm.weight", torch.ones(32, dtype=torch.int32)), "has dtype I32"),
    "plan in a plain model": (config(spd_plan={}), "an spd_plan but model_type 'llama'"),
    "export without plan": (config(model_type="spd_llama"), "no spd_plan but model_type 'spd_llama'"),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_bad_folder(tmp_path: Path, case: str) -> None:
    damage, words = BAD_FOLDERS[case]
    folder = make_llama(tmp_path / "model")
    damage(folder)
    with pytest.raises(UserError) as caught:
        CheckpointReader(folder)
    message = str(caught.value)
    assert words.format(file=folder / "model.safetensors") in message
    assert "\n" not in message


BAD_INDEXES = {
    "no JSON": ("{", "has no weight_map"),
    "no map": ("{}", "has no weight_map"),
    "missing shard": ('{"weight_map": {"model.norm.weight": "model-9.safetensors"}}', "which is not in"),
    "outside the folder": ('{"weight_map": {"model.norm.weight": "../x.safetensors"}}', "which is not in"),
}


@pytest.mark.parametrize("case", BAD_INDEXES)
def test_bad_index(tmp_path: Path, case: str) -> None:
    text, words = BAD_INDEXES[case]
    make_llama(tmp_path, max_shard_size="20KB")
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=words):
        CheckpointReader(tmp_path)


def test_index_that_promises_a_tensor_elsewhere(tmp_path: Path) -> None:
    make_llama(tmp_path, max_shard_size="20KB")
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    weight_map = content["weight_map"]
    weight_map["model.norm.weight"] = weight_map["model.embed_tokens.weight"]
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"holds model\.norm\.weight, which it does not"):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_or_inf_is_named_when_read(tmp_path: Path, value: float) -> None:
    make_llama(tmp_path)

    def damage(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.mlp.gate_proj.weight"][3, 4] = value

    edit_tensors(tmp_path, damage)
    reader = CheckpointReader(tmp_path)
    reader.block(0)
    with pytest.raises(
        CheckpointError, match=r"layers\.1\.mlp\.gate_proj\.weight.* has 1 NaN or infinite of 1536"
    ):
        reader.block(1)
    assert not torch.isfinite(reader.get("model.layers.1.mlp.gate_proj.weight", check_finite=False)).all()


def test_unknown_tensor(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no tensor nothing"):
        CheckpointReader(make_llama(tmp_path)).get("nothing")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": 3}, "config.json: plan field 'version': got 3"),
        ({"branches": 3}, "G = 3 branches do not divide"),
        ({"sync_points": ["full"]}, "plan field 'sync_points'"),
    ],
)
def test_bad_plan_inside_an_export(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    make_llama(tmp_path / "base")
    folder = make_export(tmp_path / "base", tmp_path / "out", 2, [0])
    plan = json.loads((folder / "config.json").read_text())["spd_plan"] | changes
    edit_config(folder, spd_plan=plan)
    with pytest.raises(UserError) as caught:
        CheckpointReader(folder)
    assert words in str(caught.value)


def test_plan_of_another_size_inside_an_export(tmp_path: Path) -> None:
    make_export(make_llama(tmp_path / "base"), tmp_path / "out", 2, [0])
    make_export(make_llama(tmp_path / "deeper", layers=4), tmp_path / "other", 2, [0])
    other = json.loads((tmp_path / "other" / "config.json").read_text())["spd_plan"]
    edit_config(tmp_path / "out", spd_plan=other)
    with pytest.raises(PlanError, match="made for 4 blocks, the model has 3"):
        CheckpointReader(tmp_path / "out")


@pytest.mark.parametrize("name", ["self_attn.spd_shift", "mlp.spd_norm_weight", "mlp.spd_norm_bias"])
def test_export_that_lacks_a_branch_tensor(tmp_path: Path, name: str) -> None:
    base = make_llama(tmp_path / "base")
    folder = make_export(base, tmp_path / "out", 2, [0], [(1, "attention")], norms=[(1, "mlp")])
    edit_tensors(folder, lambda tensors: tensors.pop(f"model.layers.1.{name}"))
    with pytest.raises(CheckpointError, match=rf"lacks tensor model\.layers\.1\.{name} of shape \[2, 32\]"):
        CheckpointReader(folder)
