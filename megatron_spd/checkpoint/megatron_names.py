"""Names of Megatron-core's parameters: those of a whole GPTModel of the local layer spec (``decoder.layers.3.mlp...``).

Other spellings are brought to these: Transformer Engine's, which fuses a norm with the linear behind it and has the
weights of all experts in one module, that of experts in distributed checkpoints, and those of Megatron-LM before
Megatron-core ("legacy": ``language_model.encoder.layers.3.self_attention.query_key_value.weight``).
"""

from __future__ import annotations

import re

#: The rows of a family's table of positions that Megatron-core's lacks: a tensor of our own, which it passes over.
FIRST_ROWS = "megatron_spd.embedding.position_embeddings.first_rows"

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}
_EXPERTS = (
    (re.compile(r"\.mlp\.experts\.experts(?=\.\d)"), ".mlp.experts.local_experts"),
    (
        re.compile(r"\.mlp\.experts\.(linear_fc\d\.(?:weight|bias))(\d+)"),
        r".mlp.experts.local_experts.\2.\1",
    ),
)
#: Legacy names, from their start on, and what stands there now; the first that fits is taken.
_LEGACY = (
    ("language_model.embedding.", "embedding."),
    ("language_model.output_layer.", "output_layer."),
    ("language_model.(?:encoder|transformer).final_(?:layer)?norm.", "decoder.final_layernorm."),
    ("language_model.(?:encoder|transformer).", "decoder."),
)
#: Legacy names of the parts of a layer.
_LEGACY_PARTS = (
    (".input_norm.", ".input_layernorm."),
    (r".post_attention_(?:layer)?norm.", ".pre_mlp_layernorm."),
    (r".(?:self_)?attention.query_key_value.", ".self_attention.linear_qkv."),
    (r".(?:self_)?attention.dense.", ".self_attention.linear_proj."),
    (".mlp.dense_h_to_4h.", ".mlp.linear_fc1."),
    (".mlp.dense_4h_to_h.", ".mlp.linear_fc2."),
)


def layer_name(block: int, name: str) -> str:
    """The full name of parameter ``name`` of layer ``block``."""
    return f"decoder.layers.{block}.{name}"


def split_layer_name(name: str) -> tuple[int, str] | None:
    """The layer and the name within it; None for what belongs to no layer."""
    match = _LAYER.fullmatch(name)
    return None if match is None else (int(match[1]), match[2])


def canonical(name: str) -> str:
    """The name of the local layer spec for any of the spellings."""
    for legacy, now in _LEGACY:
        match = re.match(legacy.replace(".", r"\."), name)
        if match is not None:
            name = now + name[match.end() :]
            for old, new in _LEGACY_PARTS:
                name = re.sub(old.replace(".", r"\."), new, name)
            break
    for fused, norm in _FUSED_NORMS.items():
        name = name.replace(fused, norm)
    for pattern, now in _EXPERTS:
        name = pattern.sub(now, name)
    return name
