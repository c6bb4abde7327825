"""Names of Megatron-core's parameters: those of a whole GPTModel of the local layer spec (``decoder.layers.3.mlp...``).

Other spellings are brought to these: Transformer Engine's, which fuses a norm with the linear behind it, and those of
Megatron-LM before Megatron-core ("legacy": ``language_model.encoder.layers.3.self_attention.query_key_value.weight``).
"""

from __future__ import annotations

import re

from megatron_spd.errors import UserError
from megatron_spd.models.family import ModelFamily

EMBEDDING = "embedding.word_embeddings.weight"
FINAL_NORM = "decoder.final_layernorm.weight"
OUTPUT_LAYER = "output_layer.weight"

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}
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


def outer_parameters(family: ModelFamily, tied: bool) -> dict[str, str]:
    """Hugging Face names of the tensors that belong to no block, and the parameters that hold them.

    Raises UserError for a family of which a Megatron checkpoint cannot hold everything.
    """
    tensors = family.outer_tensors(tied)
    for entry in tensors:
        if entry.offset:
            raise UserError(
                f"a Megatron checkpoint has no place for the first {entry.offset} rows of {entry.name} of a "
                f"{family.model_type} model; keep it as a Hugging Face folder"
            )
    return {entry.name: entry.parameter for entry in tensors}


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
    return name
