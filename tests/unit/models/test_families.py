"""What a family reads from a config, and the models that are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_spd.checkpoint.hf import CheckpointReader
from megatron_spd.errors import UserError
from megatron_spd.models.family import BlockSettings, Experts
from megatron_spd.models.registry import FAMILIES, REFUSED, family_of
from megatron_spd.models.weights import from_megatron, shard_block, to_megatron, unshard_block
from tests.families import CONFIGS, make_model

#: By case: what its blocks have, beside eps 1e-6 (Llama, Mistral, Qwen) or 1e-5 (OPT).
SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {"qkv_bias": True, "output_bias": True},
    "mistral with a window": {"window": 5},
    "qwen2": {"qkv_bias": True},
    "qwen2 with a window": {"qkv_bias": True, "window": 5},
    "qwen3": {},
    "qwen3 with biases": {"qkv_bias": True, "output_bias": True, "window": 5},
    "opt": {"norm_eps": 1e-5, "qkv_bias": True, "output_bias": True, "mlp_bias": True},
    "opt without biases": {"norm_eps": 1e-5},
    "mixtral": {"norm_eps": 1e-5, "experts": Experts(5, 2)},
    "qwen3_moe": {"experts": Experts(4, 2, renormalised=False)},
    "qwen3_moe renormalised": {"experts": Experts(4, 3)},
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings(case: str) -> None:
    config = CONFIGS[case].to_dict()
    expected = BlockSettings(**{"norm_eps": 1e-6, **SETTINGS[case]})
    assert family_of(config["model_type"]).settings(config) == expected


@pytest.mark.parametrize("case", CONFIGS)
@pytest.mark.parametrize("ranks", [1, 4])
def test_blocks_go_to_megatron_and_back(tmp_path: Path, case: str, ranks: int) -> None:
    folder = make_model(case, tmp_path)
    reader = CheckpointReader(folder)
    family, weights, experts = reader.family, reader.block(1), reader.settings.experts
    tables = family.tables if experts is None else family.tables.of_experts(range(experts.count))
    stored = load_file(folder / "model.safetensors")
    for name, tensor in weights.items():
        assert torch.equal(stored.pop(family.block_name(1, name)), tensor)
    assert not any(name.startswith(family.block_prefix.format(1)) for name in stored)

    parameters, groups = [t.name for t in tables.megatron], reader.kv_groups // ranks
    back = []
    for rank in range(ranks):
        state = to_megatron(shard_block(weights, family, rank, ranks), family, groups, parameters)
        back.append(from_megatron(state, family, groups, reader.head_dim, weights))
    full = unshard_block(back, family, 1)
    assert full.keys() == weights.keys()
    assert all(torch.equal(full[name], tensor) for name, tensor in weights.items())


def test_a_window_is_part_of_what_a_model_is(tmp_path: Path) -> None:
    folder = make_model("mistral with a window", tmp_path)
    before = CheckpointReader(folder).fingerprint()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"sliding_window": 6}))
    assert CheckpointReader(folder).fingerprint() != before


#: Settings of a case that its family does not cover, and words of the refusal.
UNCOVERED = [
    ("llama", {"hidden_act": "gelu"}, "hidden_act = 'gelu' in a llama config"),
    ("qwen2", {"rms_norm_eps": None}, "rms_norm_eps is None"),
    (
        "qwen2 with a window",
        {"layer_types": None, "max_window_layers": 2},
        "1 of 3 blocks of this qwen2 have a",
    ),
    (
        "qwen3",
        {"layer_types": ["full_attention", "sliding_attention"] * 2},
        "have a sliding window and the others",
    ),
    (
        "opt",
        {"do_layer_norm_before": False},
        "do_layer_norm_before = false (as in OPT-350M) is not supported",
    ),
    (
        "opt",
        {"word_embed_proj_dim": 32},
        "word_embed_proj_dim = 32 in a opt config; this family is known with 64",
    ),
    ("opt", {"activation_function": "gelu"}, "activation_function = 'gelu'"),
    ("opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine = False"),
    (
        "mixtral",
        {"num_experts_per_tok": 6},
        "num_experts_per_tok is 6 with num_local_experts = 5; expected 1 to",
    ),
    ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise = 0.1"),
    ("mixtral", {"output_router_logits": True}, "asks for a loss of the routers, which is not supported"),
    ("qwen3_moe", {"mlp_only_layers": [1]}, "blocks [1] of this qwen3_moe have a plain MLP"),
    ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step = 2"),
]


@pytest.mark.parametrize(("case", "changes", "words"), UNCOVERED)
def test_uncovered_settings_are_refused(case: str, changes: dict[str, Any], words: str) -> None:
    config = CONFIGS[case].to_dict() | changes
    with pytest.raises(UserError) as caught:
        family_of(config["model_type"]).settings(config)
    assert words in str(caught.value)


def drop_positions(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.decoder.embed_positions.weight"]


def drop_norm_bias(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.decoder.layers.1.final_layer_norm.bias"]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (drop_positions, "lacks tensor model.decoder.embed_positions.weight of shape [98, 64]"),
        (drop_norm_bias, "lacks tensor model.decoder.layers.1.final_layer_norm.bias of shape [64]"),
    ],
)
def test_missing_tensors_go_by_the_checkpoints_names(
    tmp_path: Path, damage: Callable[[dict[str, torch.Tensor]], None], words: str
) -> None:
    from safetensors.torch import save_file

    file = make_model("opt", tmp_path) / "model.safetensors"
    tensors = load_file(file)
    damage(tensors)
    save_file(tensors, file)
    with pytest.raises(UserError) as caught:
        CheckpointReader(tmp_path)
    assert words in str(caught.value)


def test_an_unknown_family_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError) as caught:
        family_of("gpt2", "the folder")
    assert str([f.model_type for f in FAMILIES]) in str(caught.value)


@pytest.mark.parametrize("model_type", REFUSED)
def test_families_with_norms_behind_their_sublayers_are_refused(model_type: str) -> None:
    with pytest.raises(UserError, match=rf"'{model_type}', which is not supported: .* cannot be dropped"):
        family_of(model_type)
