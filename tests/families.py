"""A small random model of every family, as transformers makes it, and the plain formula's view of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from megatron_spd.checkpoint.hf import CheckpointReader
from megatron_spd.models.family import ModelFamily
from megatron_spd.models.tables import expert_number
from tests.models import LLAMA3_ROPE, VOCABULARY, randomise_, tiny_tokenizer
from tests.reference import Shape, Weights, model_logits

LAYERS = 3
#: Every family has 8 query heads of 8 channels on a hidden size that is not their product, but OPT, which cannot.
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
    "max_position_embeddings": 96,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_GATED = {**_SIZES, "intermediate_size": 48, "num_key_value_heads": 4, "head_dim": 8}
_EXPERTS = {"num_experts_per_tok": 2, "initializer_range": 0.3}
_WINDOW = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}

#: Names of cases and the configs of their models; the first word is the family.
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**_GATED, attention_bias=True),
    "llama linear rope": LlamaConfig(
        **_GATED, rope_parameters={"rope_type": "linear", "factor": 3.0, "rope_theta": 5e3}
    ),
    "llama llama3 rope": LlamaConfig(**_GATED, rope_parameters={**LLAMA3_ROPE, "rope_theta": 5e3}),
    "mistral": MistralConfig(**_GATED, sliding_window=None),
    "mistral with a window": MistralConfig(**_GATED, sliding_window=5),
    "qwen2": Qwen2Config(**_GATED, tie_word_embeddings=True),
    "qwen2 with a window": Qwen2Config(**_GATED, **_WINDOW),
    "qwen3": Qwen3Config(**_GATED, tie_word_embeddings=True),
    "qwen3 with biases": Qwen3Config(**_GATED, **_WINDOW, attention_bias=True),
    "opt": OPTConfig(**{**_SIZES, "hidden_size": 64}, ffn_dim=48, dropout=0.0),
    "opt without biases": OPTConfig(
        **{**_SIZES, "hidden_size": 64}, ffn_dim=48, dropout=0.0, enable_bias=False
    ),
    "mixtral": MixtralConfig(**_GATED, **_EXPERTS, num_local_experts=5),
    "mixtral with a window": MixtralConfig(**_GATED, **_EXPERTS, num_local_experts=5, sliding_window=5),
    "qwen3_moe": Qwen3MoeConfig(
        **(_GATED | {"intermediate_size": 7}), **_EXPERTS, num_experts=4, moe_intermediate_size=24
    ),
    "qwen3_moe renormalised": Qwen3MoeConfig(
        **(_GATED | {"intermediate_size": 7}),
        **(_EXPERTS | {"num_experts_per_tok": 3}),
        num_experts=4,
        moe_intermediate_size=24,
        norm_topk_prob=True,
    ),
}


def make_model(case: str, folder: Path, **changes: Any) -> Path:
    """Write the random model of ``case``, with ``changes`` to its config, to ``folder`` as transformers would, with a
    tokenizer."""
    config = CONFIGS[case]
    model = AutoModelForCausalLM.from_config(type(config).from_dict(config.to_dict() | changes))
    randomise_(model, seed=0)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def stored_tensor(
    model: PreTrainedModel, family: ModelFamily, block: int, name: str
) -> tuple[Tensor, Tensor | None]:
    """What transformers' model has for a block-relative name, and its gradient: parameters, or parts of those in which
    it joins all experts (gate and up one after the other)."""
    own = dict(model.named_parameters())
    number = expert_number(name)
    if number is None:
        full = f"model.layers.{block}.{name}" if family.tables.experts else family.block_name(block, name)
        return own[full], own[full].grad
    joined = "down_proj" if "down_proj" in name else "gate_up_proj"
    parameter = own[f"model.layers.{block}.mlp.experts.{joined}"]
    half = {"gate_proj": 0, "up_proj": 1}.get(name.split(".")[-2])

    def part(t: Tensor) -> Tensor:
        return t[number] if half is None else t[number].chunk(2)[half]

    return part(parameter), None if parameter.grad is None else part(parameter.grad)


def shape_of(case: str) -> Shape:
    """The formula's settings, read from the config by hand. Raises KeyError for a rope scaling, which it lacks."""
    config = CONFIGS[case]
    opt, window = isinstance(config, OPTConfig), getattr(config, "sliding_window", None)
    rope = None if opt else config.rope_parameters
    if rope is not None and rope["rope_type"] != "default":
        raise KeyError(case)
    ffn = next(
        getattr(config, n)
        for n in ("moe_intermediate_size", "ffn_dim", "intermediate_size")
        if hasattr(config, n)
    )
    return Shape(
        config.hidden_size,
        config.num_attention_heads,
        config.num_attention_heads if opt else config.num_key_value_heads,
        config.hidden_size // config.num_attention_heads if opt else config.head_dim,
        ffn,
        gated=not opt,
        eps=1e-5 if opt else config.rms_norm_eps,
        rope_theta=None if rope is None else rope["rope_theta"],
        layer_norm=opt,
        activation="relu" if opt else "silu",
        window=window,
        qk_norm=isinstance(config, Qwen3Config | Qwen3MoeConfig),
        experts=getattr(config, "num_experts", 0),
        chosen=getattr(config, "num_experts_per_tok", 0),
        renormalised=getattr(config, "norm_topk_prob", True),
    )


#: The cases that the plain formula covers.
COVERED = [case for case in CONFIGS if "rope" not in case]
#: Those with experts.
EXPERTS = [case for case in CONFIGS if "mixtral" in case or "moe" in case]


class Formula:
    """The plain formula in float64 on the weights in a folder, plain or export; every weight is a leaf with a gradient.

    ``blocks[i]`` and ``outer`` hold the weights by their names in the formula.
    """

    def __init__(self, case: str, folder: Path) -> None:
        reader = CheckpointReader(folder)
        plan = reader.plan
        one_router = plan is not None and plan.routing == "first"
        self.shape = dataclasses.replace(shape_of(case), one_router=one_router)
        self.branches, self.dropped = (plan.branches, plan.dropped) if plan is not None else (1, [])
        family = reader.family
        names = {"embedding.weight": family.embedding, "norm.weight": family.final_norm}
        if family.norm == "LayerNorm":
            names["norm.bias"] = family.final_norm.replace("weight", "bias")
        self.blocks = [self._leaves(reader.block(i)) for i in range(LAYERS)]
        self.outer = self._leaves({name: reader.get(full) for name, full in names.items()})
        if family.positions is not None:
            table = reader.get(family.positions.name)
            self.outer |= self._leaves({"positions.weight": table[family.positions.offset :]})
        tied = reader.tied
        self.outer |= (
            {"output.weight": self.outer["embedding.weight"]}
            if tied
            else self._leaves({"output.weight": reader.get(family.output_layer)})
        )

    @staticmethod
    def _leaves(weights: Weights) -> dict[str, Tensor]:
        return {name: t.double().requires_grad_() for name, t in weights.items()}

    def logits(self, ids: Tensor) -> Tensor:
        """[b, s, vocabulary]."""
        return model_logits(ids, self.outer, self.blocks, self.shape, self.branches, self.dropped)

    def gradients(self, ids: Tensor, probe: Tensor) -> dict[str, Tensor]:
        """Of the sum of logits times ``probe``, for all weights of blocks by number and name."""
        (self.logits(ids) * probe).sum().backward()
        return {f"{i}.{n}": t.grad for i, block in enumerate(self.blocks) for n, t in block.items()}


def token_ids(length: int = 12, seed: int = 0) -> Tensor:
    """[2, length]."""
    return torch.randint(3, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(seed))


def probe(length: int = 12) -> Tensor:
    """Random float64 numbers in the shape of the logits of :func:`token_ids`."""
    generator = torch.Generator().manual_seed(9)
    return torch.randn(2, length, VOCABULARY, generator=generator, dtype=torch.float64)
