"""Making a clean model folder from whatever the user has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_spd.checkpoint.hf import CheckpointReader
from megatron_spd.checkpoint.prepare import embedded_gguf, prepare
from megatron_spd.errors import CheckpointError, UserError
from tests.conftest import Prepared
from tests.models import make_export, make_llama


def test_smollm2_is_ready_in_under_a_minute(prepared_smollm2: Prepared) -> None:
    # Cores that share caches and power with busy ones are several times slower.
    assert prepared_smollm2.seconds < 60


def test_smollm2_folder_is_clean_and_predicts_english(smollm2: Path) -> None:
    reader = CheckpointReader(smollm2)
    assert "quantization_config" not in reader.config
    assert (reader.num_layers, reader.hidden_size, reader.heads, reader.kv_groups) == (30, 576, 9, 3)
    assert reader.tied
    assert {reader.dtype(name) for name in reader.names()} == {torch.float32}
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    tokenizer = reader.tokenizer()
    with torch.no_grad():
        sentence = (
            "The sun rises in the east and sets in the west. Water boils at one hundred degrees Celsius."
        )
        ids = tokenizer(sentence, return_tensors="pt")["input_ids"]
        assert (
            float(model(ids, labels=ids).loss) < 3.0
        )  # a model with its heads in the wrong order gives about 8
        prompt = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
        assert tokenizer.decode(model(prompt).logits[0, -1].argmax()) == " Paris"


def test_prepared_again_is_left_alone(smollm2: Path) -> None:
    before = {file.name: file.stat().st_mtime_ns for file in smollm2.iterdir()}
    assert prepare("smollm2-135m", smollm2)["reused"] is True
    assert {file.name: file.stat().st_mtime_ns for file in smollm2.iterdir()} == before


def test_gguf_file_by_path_is_the_same_source(smollm2: Path) -> None:
    assert prepare(str(embedded_gguf()), smollm2)["reused"] is True


@pytest.mark.parametrize("shards", ["1GB", "20KB"])
def test_folder(tmp_path: Path, shards: str) -> None:
    source = make_llama(tmp_path / "model", dtype=torch.bfloat16, max_shard_size=shards)
    result = prepare(str(source), tmp_path / "out")
    assert result["reused"] is False
    assert result["family"] == "llama"
    original, prepared = CheckpointReader(source), CheckpointReader(tmp_path / "out")
    assert result["fingerprint"] == original.fingerprint() == prepared.fingerprint()
    for name in original.names():
        assert torch.equal(original.get(name), prepared.get(name))
    assert prepared.tokenizer().vocab_size == original.tokenizer().vocab_size
    assert (tmp_path / "out" / "generation_config.json").is_file()
    assert prepare(str(source), tmp_path / "out")["reused"] is True


def test_code_and_foreign_files_do_not_come_along(tmp_path: Path) -> None:
    source = make_llama(tmp_path / "model")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoConfig": "evil.Config"}}))
    (source / "evil.py").write_text("raise SystemExit")
    prepare(str(source), tmp_path / "out")
    assert "auto_map" not in CheckpointReader(tmp_path / "out").config
    assert not (tmp_path / "out" / "evil.py").exists()


# ---- what is refused ------------------------------------------------------------------------------------------


def refused(model: str | Path, out: Path, words: str) -> None:
    """``prepare`` raises one line with ``words`` and leaves nothing half-written beside ``out``."""
    before = sorted(out.parent.rglob("*"))
    with pytest.raises(UserError, match=words) as caught:
        prepare(str(model), out)
    assert "\n" not in str(caught.value)
    assert sorted(out.parent.rglob("*")) == before


def test_unknown_model(tmp_path: Path) -> None:
    refused("gpt-5", tmp_path / "out", "no model 'gpt-5'; give 'smollm2-135m', an existing .gguf file, or")


def test_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", tmp_path / "out", "has no config.json")


def test_folder_without_tokenizer(tmp_path: Path) -> None:
    refused(make_llama(tmp_path / "model", with_tokenizer=False), tmp_path / "out", "has no tokenizer")


def test_nan_in_weights(tmp_path: Path) -> None:
    source = make_llama(tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, source / "model.safetensors")
    refused(source, tmp_path / "out", r"model\.norm\.weight .* has 1 NaN or infinite of 32")


def test_an_export(tmp_path: Path) -> None:
    exported = make_export(make_llama(tmp_path / "base"), tmp_path / "export", 2, [0])
    refused(exported, tmp_path / "out", "is an SPD export, which needs no preparing")


def test_output_that_holds_another_model(tmp_path: Path) -> None:
    prepare(str(make_llama(tmp_path / "one", seed=1)), tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    refused(make_llama(tmp_path / "two", seed=2), tmp_path / "out", "already holds something else")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before


def test_file_that_is_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"something else")
    refused(tmp_path / "model.gguf", tmp_path / "out", "is no GGUF file")


def test_truncated_gguf(tmp_path: Path) -> None:
    with embedded_gguf().open("rb") as stream:
        (tmp_path / "model.gguf").write_bytes(stream.read(100_000))
    with pytest.raises(CheckpointError, match="transformers cannot read"):
        prepare(str(tmp_path / "model.gguf"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
