"""Megatron-core modules from a Hugging Face config: runs of blocks (``BlockUnit``) and whole models (``GPTModel``).

A unit is what everything that streams is made of: its weights are put in, hidden states go through, the next
block's weights take their place. A whole model is built only to be compared, trained or served.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional

from megatron_spd.errors import UserError
from megatron_spd.layers.spec import block_submodules, get_gpt_layer_spd_spec, stage_blocks
from megatron_spd.models.family import BlockSettings, ModelFamily, OuterTensor
from megatron_spd.models.weights import Weights, from_megatron, shard_block, to_megatron
from megatron_spd.plan import BlockSchedule, SPDPlan
from megatron_spd.runtime.cpu import cuda_on_cpu
from megatron_spd.runtime.distributed import Runtime

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """What the builders need to know of a model: its family, its config.json as a dict, and the size of a head."""

    family: ModelFamily
    hf_config: Mapping[str, Any]
    head_dim: int

    @property
    def kv_groups(self) -> int:
        return int(self.hf_config.get("num_key_value_heads") or self.hf_config["num_attention_heads"])

    @functools.cached_property
    def settings(self) -> BlockSettings:
        """What the config says about a block beside its sizes. Raises UserError for what the family does not cover."""
        return self.family.settings(self.hf_config)


def transformer_config(
    shape: ModelShape, runtime: Runtime, dtype: torch.dtype, **overrides: Any
) -> TransformerConfig:
    """Megatron-core's config for the model under M = ``runtime.tp_size``; ``overrides`` win (dropout,
    recompute, ...)."""
    hf, family, settings = shape.hf_config, shape.family, shape.settings
    kwargs: dict[str, Any] = {
        "num_layers": hf["num_hidden_layers"],
        "hidden_size": hf["hidden_size"],
        "ffn_hidden_size": hf[family.ffn_key],
        "num_attention_heads": hf["num_attention_heads"],
        "num_query_groups": shape.kv_groups,
        "kv_channels": shape.head_dim,
        "normalization": family.norm,
        "layernorm_epsilon": settings.norm_eps,
        "activation_func": getattr(functional, family.activation),
        "gated_linear_unit": family.tables.gated,
        "qk_layernorm": family.tables.qk_norm,
        # Megatron has one switch for all biases; a bias that the checkpoint lacks is loaded as zero.
        "add_bias_linear": settings.output_bias or settings.mlp_bias,
        "add_qkv_bias": settings.qkv_bias,
        "window_size": None if settings.window is None else (settings.window - 1, 0),
        **_expert_settings(settings),
        "tensor_model_parallel_size": runtime.tp_size,
        "params_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "pipeline_dtype": dtype,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "use_cpu_initialization": True,
        "perform_initialization": False,
        "bias_dropout_fusion": False,
        "bias_activation_fusion": False,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "gradient_accumulation_fusion": False,
    }
    return TransformerConfig(**(kwargs | overrides))


def _expert_settings(settings: BlockSettings) -> dict[str, Any]:
    """What Megatron-core's config says about experts."""
    experts = settings.experts
    if experts is None:
        return {}
    return {
        "num_moe_experts": experts.count,
        "moe_router_topk": experts.chosen,
        "moe_router_pre_softmax": not experts.renormalised,
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "allgather",
    }


def inverse_frequencies(shape: ModelShape) -> Tensor:
    """Rotary inverse frequencies [head_dim / 2] in float32 as transformers computes them, scaling included.

    Raises UserError for a scaling that depends on the sequence or also scales attention (they have no
    counterpart here).
    """
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    names = ("rope_theta", "rope_scaling", "rope_parameters", "max_position_embeddings")
    given = {n: shape.hf_config[n] for n in names if n in shape.hf_config}
    # One head is enough: the frequencies depend on its size alone.
    config = LlamaConfig(**given, hidden_size=shape.head_dim, num_attention_heads=1, num_key_value_heads=1)
    rotary = LlamaRotaryEmbedding(config)
    if rotary.attention_scaling != 1.0 or rotary.rope_type in ("dynamic", "longrope"):
        raise UserError(
            f"rope scaling {rotary.rope_type!r} is not supported; known are 'default', 'linear' and 'llama3'"
        )
    return rotary.inv_freq.detach().to(torch.float32, copy=True)


def make_rotary(shape: ModelShape, device: torch.device) -> RotaryEmbedding | None:
    """Megatron-core's rotary embedding with the model's frequencies; None for a family that learned its positions."""
    if shape.family.positions is not None:
        return None
    rotary = RotaryEmbedding(kv_channels=shape.head_dim, rotary_percent=1.0, use_cpu_initialization=True)
    rotary.inv_freq = inverse_frequencies(shape).to(device)
    return rotary


def causal_mask(length: int, device: torch.device) -> Tensor:
    """[1, 1, length, length], True where a query must not look, as Megatron-core wants it. A sliding window is not in
    it: Megatron-core makes that mask itself from its config's ``window_size``."""
    return torch.ones(length, length, dtype=torch.bool, device=device).triu(1)[None, None]


class BlockUnit(nn.Module):
    """A run of blocks under their schedules on this rank. Weights are loaded with :meth:`load_block`.

    ``fused_attention``: for evaluation only (no dropout). ``overrides``: of Megatron-core's config.
    """

    def __init__(
        self,
        shape: ModelShape,
        schedules: Sequence[BlockSchedule],
        runtime: Runtime,
        dtype: torch.dtype,
        fused_attention: bool = False,
        **overrides: Any,
    ) -> None:
        super().__init__()
        self.shape = shape
        self.runtime = runtime
        config = transformer_config(shape, runtime, dtype, **(overrides | {"num_layers": len(schedules)}))
        spec = block_submodules(config, list(schedules), fused_attention)
        self.blocks = TransformerBlock(config=config, spec=spec, post_layer_norm=False)
        mark_tensor_parallel(self)
        _place(self, runtime.device, dtype)
        self._rotary = [make_rotary(shape, runtime.device)]  # in a list: not a submodule, has no weights
        self._masks: dict[int, tuple[Tensor, Tensor | None]] = {}

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [s, b, h] -> [s, b, h]; causal, positions from 0."""
        mask, rotary = self._mask_and_rotary(x.shape[0])
        return self.blocks(x, attention_mask=mask, rotary_pos_emb=rotary)

    def layer_forward(self, x: Tensor, pending: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """One-block units only: X [s, b, h], P [B, s, b, h] or None -> the same two after the block."""
        mask, rotary = self._mask_and_rotary(x.shape[0])
        return self.blocks.layers[0](x, attention_mask=mask, context=pending, rotary_pos_emb=rotary)

    def _mask_and_rotary(self, length: int) -> tuple[Tensor, Tensor | None]:
        if length not in self._masks:
            mask = causal_mask(length, self.runtime.device)
            rotary = self._rotary[0]
            self._masks = {length: (mask, None if rotary is None else rotary(length))}
        return self._masks[length]

    def load_block(self, index: int, weights: Weights) -> None:
        """Copy a block's Hugging Face tensors (full, permuted order) into layer ``index`` of the unit."""
        shape, runtime = self.shape, self.runtime
        shard = shard_block(weights, shape.family, runtime.tp_rank, runtime.tp_size)
        load_layer(self.blocks.layers[index], shard, shape, runtime)


def layer_state(
    shard: Weights, shape: ModelShape, runtime: Runtime, dtype: torch.dtype, names: Iterable[str]
) -> dict[str, Tensor]:
    """The Megatron-core parameters ``names`` of one layer on this rank's device, from its Hugging Face shard."""
    state = to_megatron(shard, shape.family, shape.kv_groups // runtime.tp_size, names)
    return {name: t.to(runtime.device, dtype).contiguous() for name, t in state.items()}


def load_layer(layer: nn.Module, shard: Weights, shape: ModelShape, runtime: Runtime) -> None:
    """Copy a rank's Hugging Face shard of one block into a Megatron-core layer."""
    parameters = dict(layer.named_parameters())
    dtype = next(iter(parameters.values())).dtype
    state = layer_state(shard, shape, runtime, dtype, parameters)
    for name, parameter in parameters.items():
        parameter.data.copy_(state[name])


def layer_shard(
    layer: nn.Module, names: Iterable[str], shape: ModelShape, runtime: Runtime
) -> dict[str, Tensor]:
    """This rank's shard of a Megatron-core layer under Hugging Face ``names``: the inverse of :func:`load_layer`."""
    state = {name: p.detach() for name, p in layer.named_parameters()}
    return from_megatron(state, shape.family, shape.kv_groups // runtime.tp_size, shape.head_dim, names)


def refer_to(layer: nn.Module, state: Weights) -> None:
    """Make a layer's parameters refer to the tensors of ``state`` without copying them."""
    for name, parameter in layer.named_parameters():
        parameter.data = state[name]


def _place(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Move ``module`` to ``device``. Megatron-core makes norms and learned positions in float32 whatever the dtype;
    PyTorch's LayerNorm wants the dtype of its input, and positions are added to embeddings."""
    module.to(device)
    for part in module.modules():
        if isinstance(part, nn.LayerNorm | nn.Embedding):
            part.to(dtype)


def mark_tensor_parallel(module: nn.Module) -> None:
    """Set the attributes by which Megatron-core and DeepSpeed know a sharded parameter (gradient norms count
    it on every rank). Megatron-core sets them only when it initialises weights itself, which a loaded model
    skips."""
    for part in module.modules():
        dims = {ColumnParallelLinear: (0, 0), RowParallelLinear: (1, None), VocabParallelEmbedding: (0, None)}
        for kind, (weight_dim, bias_dim) in dims.items():
            if isinstance(part, kind):
                _mark(part.weight, weight_dim)
                _mark(getattr(part, "bias", None), bias_dim)


def _mark(parameter: nn.Parameter | None, dim: int | None) -> None:
    if parameter is not None and dim is not None and not hasattr(parameter, "tensor_model_parallel"):
        set_tensor_model_parallel_attributes(parameter, True, dim, 1)


def build_gpt_model(
    shape: ModelShape,
    plan: SPDPlan,
    block_weights: Callable[[int], Weights],
    tensor: Callable[[str], Tensor],
    runtime: Runtime,
    dtype: torch.dtype,
    fused_attention: bool = False,
    **overrides: Any,
) -> GPTModel:
    """The model under ``plan`` on this rank, or this rank's pipeline stage of it, weights loaded.

    ``block_weights(i)``: full Hugging Face tensors of block ``i`` in the plan's permuted order; only the stage's blocks
    are asked for. ``tensor(name)``: any other tensor. The vocabulary is padded with zero rows to a multiple of M;
    ``logits[..., :vocab_size]`` are the model's. ``fused_attention``: for evaluation and inference (no dropout).
    ``overrides``: of Megatron-core's config, uneven stages among them. What ``plan`` drops at a stage's end is
    synced there (:func:`megatron_spd.layers.spec.pipeline_plan`).
    """
    hf, family = shape.hf_config, shape.family
    stages = {"pipeline_model_parallel_size": runtime.pp_size}
    config = transformer_config(shape, runtime, dtype, **(stages | overrides))
    vocab = -(-hf["vocab_size"] // runtime.tp_size) * runtime.tp_size
    with cuda_on_cpu():
        model = GPTModel(
            config=config,
            transformer_layer_spec=get_gpt_layer_spd_spec(config, plan, fused_attention),
            vocab_size=vocab,
            max_sequence_length=hf.get("max_position_embeddings", 2048),
            share_embeddings_and_output_weights=family.is_tied(hf),
            position_embedding_type="rope" if family.positions is None else "learned_absolute",
            pre_process=runtime.pp_rank == 0,
            post_process=runtime.pp_rank == runtime.pp_size - 1,
        )
    mark_tensor_parallel(model)
    _place(model, runtime.device, dtype)
    if family.positions is None:
        model.rotary_pos_emb = make_rotary(shape, runtime.device)
    for entry, parameter in outer_parameters(model, family).items():
        given = tensor(entry.name)
        parameter.data.copy_(
            _vocabulary_shard(given, vocab, runtime) if entry.vocabulary else given[entry.offset :]
        )
    for i, layer in zip(stage_blocks(config), model.decoder.layers, strict=True):
        shard = shard_block(block_weights(i), family, runtime.tp_rank, runtime.tp_size)
        load_layer(layer, shard, shape, runtime)
    return model


def outer_parameters(model: GPTModel, family: ModelFamily) -> dict[OuterTensor, nn.Parameter]:
    """What a stage has outside its blocks. A tied table is the embedding on the first stage and a copy of it on the
    last, whose gradients Megatron-core sums."""
    own = dict(model.named_parameters())
    tied = model.share_embeddings_and_output_weights
    found = {t: own[t.parameter] for t in family.outer_tensors(tied) if t.parameter in own}
    if tied and model.post_process and not model.pre_process:
        found |= {t: model.output_layer.weight for t in family.outer_tensors(tied) if t.vocabulary}
    return found


def vocabulary_rows(rows: int, vocab_size: int, runtime: Runtime) -> int:
    """How many of this rank's ``rows`` of a table hold tokens; the others pad the vocabulary."""
    return max(0, min(rows, vocab_size - runtime.tp_rank * rows))


def _vocabulary_shard(weight: Tensor, vocab: int, runtime: Runtime) -> Tensor:
    """This rank's rows of an embedding [vocab_size, h] padded to ``vocab`` rows."""
    rows = vocab // runtime.tp_size
    part = weight[runtime.tp_rank * rows : (runtime.tp_rank + 1) * rows]
    return part if len(part) == rows else torch.cat([part, part.new_zeros(rows - len(part), weight.shape[1])])
