"""Small random models as real Hugging Face folders, for tests.

Nothing is downloaded: the weights are drawn from a seed, and the tokenizer is a byte-level BPE trained on a
few sentences kept here, so that any text can be tokenised and decoded again.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from megatron_spd.checkpoint.export import export
from megatron_spd.checkpoint.hf import CheckpointReader
from megatron_spd.plan import Routing, SPDPlan

#: Vocabulary of the tiny tokenizer: 256 bytes, 3 special tokens, learned merges. Divides by 2, 3 and 4 ranks.
VOCABULARY = 324

#: A rope scaling of the Llama-3 kind whose low and high frequency parts both fall inside small heads.
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

_SENTENCES = (
    "The residual is added once, after the one remaining all-reduce.",
    "A statement is executed, and the value of the expression is the value of the last one.",
    "The first line of the function names the arguments that the caller has to give.",
    "Every rank holds some of the heads and some of the neurons of the block.",
)


def tiny_text(sentences: int = 200) -> str:
    """English text of ``sentences`` sentences for the tiny tokenizer (about 20 to 30 of its tokens each)."""
    return "\n".join(f"{i}. {_SENTENCES[i % len(_SENTENCES)]}" for i in range(sentences))


@functools.cache
def _trained() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    return tokenizer.to_str()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of :data:`VOCABULARY` tokens; <s> = 0, </s> = 1, <pad> = 2, none added."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained()), bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def llama_config(
    hidden: int = 32,
    heads: int = 4,
    kv: int = 2,
    layers: int = 3,
    ffn: int = 48,
    *,
    head_dim: int | None = None,
    vocabulary: int = VOCABULARY,
    tied: bool = True,
    biases: bool = False,
    rope_theta: float = 10000.0,
    rope_scaling: dict[str, Any] | None = None,
) -> LlamaConfig:
    """The config of a small Llama; ``rope_scaling`` may be :data:`LLAMA3_ROPE`."""
    rope = {"rope_type": "default", "rope_theta": rope_theta, **(rope_scaling or {})}
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        head_dim=head_dim or hidden // heads,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        attention_bias=biases,
        mlp_bias=biases,
        rope_parameters=rope,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )


def randomise_(model: torch.nn.Module, seed: int) -> None:
    """Overwrite every parameter with random values so large that what one branch sees matters.

    Matrices get standard deviation 1.5 / sqrt(fan-in), norm weights 1 +- 0.2, biases 0.3, embeddings 1.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if "norm" in name and name.endswith("weight"):
                noise = 1 + 0.2 * noise
            elif parameter.dim() == 1:
                noise = 0.3 * noise
            elif "embed" not in name:
                noise = 1.5 * parameter.shape[-1] ** -0.5 * noise
            parameter.copy_(noise)


def make_llama(
    folder: str | Path,
    hidden: int = 32,
    heads: int = 4,
    kv: int = 2,
    layers: int = 3,
    ffn: int = 48,
    *,
    tied: bool = True,
    biases: bool = False,
    dtype: torch.dtype = torch.float32,
    with_tokenizer: bool = True,
    seed: int = 0,
    max_shard_size: str = "1GB",
    **config: Any,
) -> Path:
    """Write a random Llama to ``folder`` as transformers would (config, safetensors, tokenizer); returns it.

    ``max_shard_size`` (for example "20KB") makes a sharded checkpoint; ``config`` goes to
    :func:`llama_config`.
    """
    folder = Path(folder)
    model = LlamaForCausalLM(llama_config(hidden, heads, kv, layers, ffn, tied=tied, biases=biases, **config))
    randomise_(model, seed)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    if with_tokenizer:
        tiny_tokenizer().save_pretrained(folder)
    return folder


def make_export(
    base: str | Path,
    out: str | Path,
    branches: int,
    dropped: Sequence[int],
    shifts: Sequence[tuple[int, str]] = (),
    seed: int = 1,
    norms: Sequence[tuple[int, str]] = (),
    low_bit: Mapping[int, str] | None = None,
    routing: Routing = "branch",
) -> Path:
    """Export the plain model in ``base`` with ``dropped`` sync points, random shifts and branch norms; returns ``out``.

    ``shifts``, ``norms``: pairs (block, "attention" or "mlp"); ``low_bit``: formats of kept points. Heads and neurons
    keep their order.
    """
    reader = CheckpointReader(base)
    plan = SPDPlan.dense(reader.base_model(), branches).with_drops(dropped)
    points = [(low_bit or {}).get(p, c) for p, c in enumerate(plan.sync_points)]
    plan = dataclasses.replace(plan, sync_points=points, routing=routing)
    for block, sublayer in shifts:
        plan = plan.with_block(block, **{f"{sublayer}_shift": True})
    for block, sublayer in norms:
        plan = plan.with_block(block, **{f"{sublayer}_norm": True})
    generator = torch.Generator().manual_seed(seed)

    def blocks(i: int) -> dict[str, torch.Tensor]:
        weights = reader.block(i)
        for entry in reader.family.planned_branch_tensors(plan.blocks[i]):
            noise = 0.5 * torch.randn(branches, reader.hidden_size, generator=generator)
            weights[entry.source] = noise + (entry.initial or 0.0)
        return weights

    export(reader, plan, blocks, Path(out))
    return Path(out)
