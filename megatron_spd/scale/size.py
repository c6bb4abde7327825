"""The sizes of a model's tensors, from its config.json or from a table of known models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_spd.checkpoint.hf import read_config
from megatron_spd.errors import UserError
from megatron_spd.plan import BaseModel

#: The fields of known models' config.json that decide sizes.
TABLE = Path(__file__).with_name("models.json")

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
#: Positions that OPT's table of positions has beside those of the text.
_OPT_EXTRA_POSITIONS = 2


@dataclass(frozen=True)
class ModelSize:
    """Numbers of parameters. ``heads``, ``kv_groups`` and ``head_dim`` are the config's; ``experts`` and ``active`` are
    1 without a mixture of experts."""

    name: str
    model_type: str
    layers: int
    hidden: int
    heads: int
    kv_groups: int
    head_dim: int
    ffn: int
    vocabulary: int
    tied: bool
    stored_bytes: int
    experts: int = 1
    active: int = 1
    qkv_bias: bool = False
    output_biases: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    gated: bool = True
    norm_bias: bool = False
    positions: int = 0

    # ---- one block --------------------------------------------------------------------------------------------

    @property
    def qkv_rows(self) -> int:
        """Output rows of the query, key and value projections together."""
        return (self.heads + 2 * self.kv_groups) * self.head_dim

    @property
    def attention_matrices(self) -> int:
        return self.hidden * (self.qkv_rows + self.heads * self.head_dim)

    @property
    def readers(self) -> int:
        """Elements of the MLP's first projections (of one expert)."""
        return (2 if self.gated else 1) * self.hidden * self.ffn

    @property
    def mlp_matrices(self) -> int:
        """Of one expert."""
        return self.readers + self.hidden * self.ffn

    @property
    def split(self) -> int:
        """Elements of a block that tensor-parallel ranks share out."""
        biases = self.qkv_bias * self.qkv_rows
        biases += self.mlp_bias * self.experts * self.ffn * (2 if self.gated else 1)
        return self.attention_matrices + self.experts * self.mlp_matrices + biases

    @property
    def replicated(self) -> int:
        """Elements of a block that every rank has: norms, output biases, the router."""
        vectors = 2 * (1 + self.norm_bias) * self.hidden + 2 * self.qk_norm * self.head_dim
        vectors += (self.output_biases + self.mlp_bias * self.experts) * self.hidden
        router = self.experts * self.hidden if self.experts > 1 else 0
        return vectors + router

    @property
    def block(self) -> int:
        """Elements of a block."""
        return self.split + self.replicated

    def block_on(self, ranks: int) -> int:
        """Elements of a block on one of ``ranks`` tensor-parallel ranks."""
        return self.split // ranks + self.replicated

    # ---- the rest ---------------------------------------------------------------------------------------------

    @property
    def table(self) -> int:
        """Elements of the embedding, or of the output layer."""
        return self.vocabulary * self.hidden

    @cached_property
    def parameters(self) -> int:
        """Of the whole model."""
        ends = self.table * (1 if self.tied else 2) + (1 + self.norm_bias) * self.hidden
        return self.layers * self.block + ends + self.positions * self.hidden

    def forward_flops(self, length: int) -> float:
        """Floating-point operations of one block for one token, in causal sequences of ``length`` tokens: two for each
        weight that is used, and the scores and sums of attention over half the sequence on average."""
        matrices = self.attention_matrices + self.active * self.mlp_matrices
        return 2.0 * matrices + 2.0 * length * self.heads * self.head_dim

    @property
    def head_flops(self) -> float:
        """Of the output layer, for one token."""
        return 2.0 * self.table

    def base_model(self) -> BaseModel:
        """As plans know it; without weights it has no fingerprint."""
        return BaseModel(
            "none", self.model_type, self.layers, self.hidden, self.heads, self.kv_groups, self.ffn
        )


def model_size(config: str) -> ModelSize:
    """The model called ``config`` in the table, or that of a config.json (or of a folder with one).

    Raises UserError for a name that is not known, a config that lacks a field, and a family whose sizes are not known.
    """
    known = json.loads(TABLE.read_text(encoding="utf-8"))
    if config in known:
        return _from_config(config, known[config])
    path = Path(config)
    if path.is_dir():
        return _from_config(config, read_config(path))
    if path.is_file():
        return _from_config(config, _read(path))
    raise UserError(
        f"no model config {config!r}; known are {', '.join(known)}, or give the path of a config.json"
    )


def _read(path: Path) -> Mapping[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); give a model's config.json") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path} holds a {type(raw).__name__}; give a model's config.json, an object")
    return raw


def _from_config(name: str, raw: Mapping[str, Any]) -> ModelSize:
    kind = raw.get("model_type")
    if kind not in _KINDS:
        raise UserError(f"{name} has model_type {kind!r}; sizes are known for {', '.join(sorted(_KINDS))}")
    hidden, heads = _whole(name, raw, "hidden_size"), _whole(name, raw, "num_attention_heads")
    return ModelSize(
        name=name,
        model_type=kind,
        layers=_whole(name, raw, "num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_groups=_whole(name, raw, "num_key_value_heads", heads),
        head_dim=_whole(name, raw, "head_dim", hidden // heads),
        ffn=_whole(name, raw, "ffn_dim" if kind == "opt" else "intermediate_size"),
        vocabulary=_whole(name, raw, "vocab_size"),
        tied=bool(raw.get("tie_word_embeddings", kind == "opt")),
        stored_bytes=_BYTES.get(str(raw.get("dtype") or raw.get("torch_dtype") or "bfloat16"), 2),
        **_KINDS[kind](name, raw),
    )


def _whole(name: str, raw: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = raw.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{name}: {key} is {value!r}, expected a whole number >= 1")
    return value


def _llama(_name: str, raw: Mapping[str, Any]) -> dict[str, Any]:
    biases = bool(raw.get("attention_bias"))
    return {"qkv_bias": biases, "output_biases": biases, "mlp_bias": bool(raw.get("mlp_bias"))}


def _qwen2(_name: str, _raw: Mapping[str, Any]) -> dict[str, Any]:
    return {"qkv_bias": True}


def _qwen3(name: str, raw: Mapping[str, Any]) -> dict[str, Any]:
    return _llama(name, raw) | {"qk_norm": True}


def _mixtral(name: str, raw: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "experts": _whole(name, raw, "num_local_experts"),
        "active": _whole(name, raw, "num_experts_per_tok"),
    }


def _opt(name: str, raw: Mapping[str, Any]) -> dict[str, Any]:
    projected = raw.get("word_embed_proj_dim") or raw["hidden_size"]
    if projected != raw["hidden_size"] or not raw.get("do_layer_norm_before", True):
        raise UserError(
            f"{name}: an OPT with projected embeddings or with norms behind its sublayers (OPT-350M); its sizes are "
            "not known"
        )
    biases = {"qkv_bias": True, "output_biases": True, "mlp_bias": True, "norm_bias": True}
    return {
        **biases,
        "gated": False,
        "positions": _whole(name, raw, "max_position_embeddings") + _OPT_EXTRA_POSITIONS,
    }


#: What the config of a family says beside what all have.
_KINDS = {
    "llama": _llama,
    "mistral": lambda *_: {},
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "mixtral": _mixtral,
    "opt": _opt,
}
