"""Greedy text from plain and exported folders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from megatron_spd.checkpoint.hf import CheckpointReader
from megatron_spd.checkpoint.remote_code.modeling_spd import SPDLlamaForCausalLM
from megatron_spd.errors import CheckpointError, UserError
from megatron_spd.evaluate.generate import generate_text, load_for_generation
from tests.models import make_export, make_llama

PROMPT = "Every rank holds"


@pytest.mark.parametrize("tied", [True, False])
def test_text_is_the_greedy_continuation(tmp_path: Path, tied: bool) -> None:
    base = make_llama(tmp_path / "base", tied=tied)
    out = make_export(base, tmp_path / "out", 2, [0, 1, 4])
    texts = []
    for folder, kind in ((base, LlamaForCausalLM), (out, SPDLlamaForCausalLM)):
        tokenizer = CheckpointReader(folder).tokenizer()
        model = kind.from_pretrained(folder)
        ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
        start = ids.shape[1]
        while ids.shape[1] < start + 8 and int(ids[0, -1]) != model.config.eos_token_id:
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        texts.append(generate_text(folder, PROMPT, 8))
        assert texts[-1] == tokenizer.decode(ids[0, start:], skip_special_tokens=True)
    assert texts[0] != texts[1]  # the plan of the export is followed


def test_sampling_settings_in_the_folder_are_not_followed(tmp_path: Path) -> None:
    base = make_llama(tmp_path)
    before = generate_text(base, PROMPT, 8)
    (base / "generation_config.json").write_text(
        '{"do_sample": true, "temperature": 5.0, "eos_token_id": [1], "max_new_tokens": 1}'
    )
    assert [generate_text(base, PROMPT, 8) for _ in range(2)] == [before, before]


def test_code_in_the_folder_is_not_run(tmp_path: Path) -> None:
    out = make_export(make_llama(tmp_path / "base"), tmp_path / "out", 2, [0])
    for file in out.glob("*.py"):
        file.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nraise SystemExit('run')\n")
    generate_text(out, PROMPT, 2)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stored_dtype_unless_told(tmp_path: Path, dtype: torch.dtype) -> None:
    base = make_llama(tmp_path / "base", dtype=dtype)
    assert load_for_generation(base).dtype == dtype
    out = make_export(base, tmp_path / "out", 2, [0], [(0, "mlp")])
    assert {p.dtype for p in load_for_generation(out).parameters()} == {dtype}
    assert {p.dtype for p in load_for_generation(out, torch.float64).parameters()} == {torch.float64}


def test_bad_input(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base")
    with pytest.raises(UserError, match="the prompt has no tokens"):
        generate_text(base, "", 5)
    with pytest.raises(UserError, match="max-new-tokens is 0"):
        generate_text(base, PROMPT, 0)
    with pytest.raises(CheckpointError, match="no model folder"):
        generate_text(tmp_path / "nowhere", PROMPT, 5)


def test_nan_in_weights(tmp_path: Path) -> None:
    base = make_llama(tmp_path)
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = torch.inf
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        generate_text(base, PROMPT, 2)
