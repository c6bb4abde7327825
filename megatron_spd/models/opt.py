"""OPT: LayerNorm, a plain MLP with ReLU, biases everywhere, learned positions that start at row 2 of their table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_spd.errors import UserError
from megatron_spd.models.family import BlockSettings, LearnedPositions, ModelFamily
from megatron_spd.models.reading import NORM_BEHIND, expect
from megatron_spd.models.tables import block_tables


def _settings(hf: Mapping[str, Any]) -> BlockSettings:
    if not hf.get("do_layer_norm_before", True):
        raise UserError(f"do_layer_norm_before = false (as in OPT-350M) is not supported: {NORM_BEHIND}")
    hidden = hf["hidden_size"]
    expect(
        {**hf, "word_embed_proj_dim": hf.get("word_embed_proj_dim") or hidden},
        activation_function="relu",
        word_embed_proj_dim=hidden,
        layer_norm_elementwise_affine=True,
        _remove_final_layer_norm=False,
        layerdrop=0.0,
    )
    biases = bool(hf.get("enable_bias", True))
    return BlockSettings(
        norm_eps=1e-5,  # of torch's LayerNorm; not in the config
        qkv_bias=biases,
        output_bias=biases,
        mlp_bias=biases,
    )


OPT = ModelFamily(
    model_type="opt",
    classes="OPT",
    settings=_settings,
    tables=block_tables(norm_bias=True, gated=False),
    norm="LayerNorm",
    activation="relu",
    positions=LearnedPositions("model.decoder.embed_positions.weight", offset=2),
    block_prefix="model.decoder.layers.{}.",
    embedding="model.decoder.embed_tokens.weight",
    final_norm="model.decoder.final_layer_norm.weight",
    tied=True,
    ffn_key="ffn_dim",
    stored_names={
        "self_attn.o_proj": "self_attn.out_proj",
        "input_layernorm": "self_attn_layer_norm",
        "post_attention_layernorm": "final_layer_norm",
        "mlp.up_proj": "fc1",
        "mlp.down_proj": "fc2",
    },
)
