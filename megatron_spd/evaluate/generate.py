"""Greedy text from a plain or an exported SPD folder, on one device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import GenerationConfig, PreTrainedModel

from megatron_spd.checkpoint.folders import GENERATION_CONFIG
from megatron_spd.checkpoint.hf import CheckpointReader
from megatron_spd.checkpoint.remote_code import modeling_spd
from megatron_spd.errors import UserError


def load_for_generation(folder: str | Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model in ``folder``, plain or SPD export, in evaluation mode on the CPU, in its stored dtype or ``dtype``.

    The code inside an export is never run: the class is this package's own copy of it. Raises CheckpointError or
    PlanError for a folder that is broken or holds NaN or infinity.
    """
    reader = CheckpointReader(folder)
    name = f"{reader.family.classes}ForCausalLM"
    kind = getattr(transformers, name) if reader.plan is None else getattr(modeling_spd, f"SPD{name}")
    config = kind.config_class.from_dict(reader.config)
    weights = {name: reader.get(name) for name in reader.names()}
    wanted = dtype or reader.dtype(reader.family.embedding)
    model = kind.from_pretrained(None, config=config, state_dict=weights, dtype=wanted)
    return model.eval()


def generate_text(folder: str | Path, prompt: str, max_new_tokens: int) -> str:
    """The greedy continuation of ``prompt`` (without the prompt), at most ``max_new_tokens`` tokens, stopping at the
    model's end-of-text token. Raises UserError for an empty prompt or a count below 1, and as
    :func:`load_for_generation`."""
    if max_new_tokens < 1:
        raise UserError(f"max-new-tokens is {max_new_tokens}, expected at least 1")
    tokenizer = CheckpointReader(folder).tokenizer()
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    if ids.shape[1] == 0:
        raise UserError("the prompt has no tokens; give some text to continue")
    model = load_for_generation(folder)
    settings = _greedy(Path(folder), model, max_new_tokens)
    with torch.inference_mode():
        generating: Any = model  # the class that all causal models of transformers share has no generate
        out = generating.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


def _greedy(folder: Path, model: PreTrainedModel, max_new_tokens: int) -> GenerationConfig:
    """Greedy settings with the model's own end tokens: its generation config may list more than its config does."""
    stored = (
        GenerationConfig.from_pretrained(folder)
        if (folder / GENERATION_CONFIG).is_file()
        else GenerationConfig.from_model_config(model.config)
    )
    end = stored.eos_token_id
    pad = stored.pad_token_id
    if pad is None:
        pad = end[0] if isinstance(end, list) else end
    return GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=end, pad_token_id=pad
    )
