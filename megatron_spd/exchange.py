"""The queue between a loader and a saver of Megatron-LM's ``tools/checkpoint/convert.py``, either side of it.

Messages are dicts of whole tensors, as one tensor-parallel rank would hold them, each with its ``name``: "embeddings",
"transformer layer 0" and so on, "final norm", "output layer" (of an untied model); then the word "done", or "exit" from
a loader that failed. Before them comes a namespace with the settings of the model. From our loader to our saver there
may be more than Megatron-LM's have entries for, each by the parameter's own name behind the word "spd": an SPD model's
branch vectors, experts, norms of heads. The folder of the model's config goes along in the settings.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from megatron_spd.checkpoint.dist_model import megatron_parameter
from megatron_spd.checkpoint.hf import CheckpointReader, read_config
from megatron_spd.checkpoint.megatron import MegatronReader
from megatron_spd.checkpoint.megatron_names import FIRST_ROWS, layer_name
from megatron_spd.checkpoint.view import ModelView, view_of
from megatron_spd.converting import write_folder
from megatron_spd.errors import CheckpointError, UserError
from megatron_spd.models.build import ModelShape, transformer_config
from megatron_spd.models.family import EMBEDDING, FINAL_NORM, FINAL_NORM_BIAS, OUTPUT_LAYER, POSITIONS
from megatron_spd.runtime.distributed import initialize, shutdown

#: Entries of a layer's message and the parameters of the layer; a gated MLP's first linear comes in two halves.
_LAYER = {
    f"{entry} {kind}": f"{name}.{kind}"
    for entry, name in {
        "input norm": "input_layernorm",
        "qkv": "self_attention.linear_qkv",
        "dense": "self_attention.linear_proj",
        "post norm": "pre_mlp_layernorm",
        "mlp l0": "mlp.linear_fc1",
        "mlp l1": "mlp.linear_fc2",
    }.items()
    for kind in ("weight", "bias")
}
_HALVES = ("W", "V")
#: Starts the entries that only our own loader sends.
_SPD = "spd "
_OTHER_MESSAGES = {
    "embeddings": {"word embeddings": EMBEDDING, "position embeddings": POSITIONS},
    "final norm": {"weight": FINAL_NORM, "bias": FINAL_NORM_BIAS},
    "output layer": {"weight": OUTPUT_LAYER},
}
#: What Megatron-LM numbers the first training step; its savers know no step 0.
_ITERATION = 1


def send_model(queue: Any, reader: CheckpointReader, saver: str, model_type: str) -> None:
    """Put the model of ``reader`` on the queue. Raises UserError for an SPD model and a ``saver`` that would lose its
    plan, or tensors that Megatron-LM's messages have no entry for, and for a ``model_type`` other than GPT."""
    if model_type != "GPT":
        raise UserError(f"--model-type is {model_type}; expected GPT")
    if saver not in ("spd", "saver_spd"):
        _check_sent(reader, saver)
    settings = _settings(reader)
    queue.put(settings)
    view = view_of(reader)
    for name, entries in _messages(view, settings):
        message: dict[str, Any] = {}
        for entry, parameter in entries.items():
            tensor = megatron_parameter(view, parameter, view.get).contiguous()
            halved = settings.swiglu and entry.startswith("mlp l0 ")
            parts = dict(zip(_HALVES, tensor.chunk(2), strict=True)) if halved else {"": tensor}
            message |= {f"{entry} {half}".strip(): part.clone() for half, part in parts.items()}
        queue.put(message | {"name": name})
    queue.put("done")


def receive_model(queue: Any, out: Path, hf_config: str | None, checking: bool = True) -> str:
    """Write the model that comes over the queue as a Hugging Face folder, an export if it has a plan; returns its
    fingerprint. The whole model is held in memory, as the savers of Megatron-LM hold it.

    ``hf_config``: the folder with its config.json and tokenizer; None: the one that the loader names. ``checking``:
    refuse entries that are not known. Raises CheckpointError for messages that are out of order or do not make the
    model of the config. The queue is read to its end in any case, so that no loader waits for a saver that has gone.
    """
    rest = _Messages(queue)
    try:
        settings = rest.settings()
        folder = hf_config or getattr(settings, "hf_config", None)
        if folder is None:
            raise CheckpointError(
                "the loader does not say where the model's config is; give its Hugging Face folder as --hf-config"
            )
        read_config(Path(folder))
        store = _ReceivedStore(Path(folder), dict(rest.parameters(checking)))
        return write_folder(view_of(MegatronReader.of_store(store, folder)), out)
    finally:
        rest.drain()


def _check_sent(reader: CheckpointReader, saver: str) -> None:
    """Raise UserError for a model of which a saver of Megatron-LM would lose something."""
    family = reader.family
    instead = "give --saver spd, or use `megatron-spd convert`"
    if reader.plan is not None:
        raise UserError(f"{reader.folder} is an SPD model; saver {saver!r} would lose its plan: {instead}")
    lost = [entry.name for entry in family.outer_tensors(reader.tied) if entry.offset]
    covered = {source for t in family.tables.megatron if t.name in _LAYER.values() for source in t.sources}
    lost += [name for name in reader.block_names(0) if name not in covered]
    if lost:
        raise UserError(
            f"Megatron-LM's checkpoint queue has no entry for all of {lost[0]} of a {family.model_type} model: "
            f"{instead}"
        )


class _Messages:
    """What comes over the queue, up to its end."""

    def __init__(self, queue: Any) -> None:
        self._queue, self._ended = queue, False

    def settings(self) -> Any:
        """The namespace that comes first."""
        first = self._get()
        if self._ended or isinstance(first, Mapping):
            raise CheckpointError("the loader ended before it sent a model; see its own message")
        return first

    def parameters(self, checking: bool) -> Iterator[tuple[str, Tensor]]:
        """The parameters of all messages by canonical name. Raises CheckpointError."""
        layer = 0
        while True:
            message = self._get()
            if message == "exit":
                raise CheckpointError("the loader ended before it sent all of the model; see its own message")
            if message == "done":
                return
            name = message.pop("name")
            is_layer = name == f"transformer layer {layer}"
            if not is_layer and name not in _OTHER_MESSAGES:
                raise CheckpointError(f"the loader sent {name!r}, expected 'transformer layer {layer}'")
            for entry, tensor in _whole(message).items():
                known = _LAYER if is_layer else _OTHER_MESSAGES[name]
                parameter = entry.removeprefix(_SPD) if entry.startswith(_SPD) else known.get(entry)
                if parameter is not None:
                    yield layer_name(layer, parameter) if is_layer else parameter, tensor
                elif checking:
                    raise CheckpointError(
                        f"{name!r} has {entry!r}, which is not known here; --no-checking passes it over"
                    )
            layer += is_layer

    def drain(self) -> None:
        """Read to the end."""
        while not self._ended:
            self._get()

    def _get(self) -> Any:
        message = self._queue.get()
        self._ended = isinstance(message, str)
        return message


class _ReceivedStore:
    """Parameters in memory (a ``ParameterStore`` of one rank)."""

    ranks = 1

    def __init__(self, folder: Path, parameters: dict[str, Tensor]) -> None:
        self.folder = folder
        self._parameters = parameters

    def names(self) -> Collection[str]:
        return self._parameters.keys()

    def like(self, name: str, rank: int) -> Tensor:
        return torch.empty_like(self._parameters[name], device="meta")

    def load(self, name: str, rank: int) -> Tensor:
        return self._parameters[name]


def _messages(view: ModelView, settings: Any) -> Iterator[tuple[str, dict[str, str]]]:
    """Names of messages, and their entries with the parameters that they hold."""
    reader = view.reader
    outer = {entry.parameter: entry for entry in reader.family.outer_tensors(reader.tied)}

    def others(message: str) -> tuple[str, dict[str, str]]:
        held = {entry: name for entry, name in _OTHER_MESSAGES[message].items() if name in outer}
        first_rows = any(outer[name].offset for name in held.values())
        return message, held | ({f"{_SPD}{FIRST_ROWS}": FIRST_ROWS} if first_rows else {})

    yield others("embeddings")
    for block in range(reader.num_layers):
        entries = _layer_entries(reader, block, settings)
        yield (
            f"transformer layer {block}",
            {entry: layer_name(block, name) for entry, name in entries.items()},
        )
    yield others("final norm")
    if not reader.tied:
        yield others("output layer")


def _layer_entries(reader: CheckpointReader, block: int, settings: Any) -> dict[str, str]:
    """The entries of a layer's message and the parameters of the layer that they hold."""
    biases = {"qkv bias": settings.qkv_bias, "input norm bias": settings.norm_has_bias}
    biases |= {"post norm bias": settings.norm_has_bias}
    family, held = reader.family, set(reader.block_names(block))
    table = family.written_out(reader.settings).megatron
    own = {entry.name for entry in table}
    entries = {
        entry: name
        for entry, name in _LAYER.items()
        if name in own and (not entry.endswith("bias") or biases.get(entry, settings.linear_bias))
    }
    more = [entry.name for entry in table if entry.name not in _LAYER.values() and held & {*entry.sources}]
    more += [entry.name for entry in family.branch_tensors if entry.source in held]
    return entries | {f"{_SPD}{name}": name for name in more}


def _whole(message: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A message with the halves of a gated MLP's first linear put together."""
    whole = dict(message)
    for entry in [name.removesuffix(f" {_HALVES[0]}") for name in message if name.endswith(f" {_HALVES[0]}")]:
        whole[entry] = torch.cat([whole.pop(f"{entry} {half}") for half in _HALVES])
    return whole


def _settings(reader: CheckpointReader) -> SimpleNamespace:
    """The namespace in front of the messages, with what savers of Megatron-LM ask it for."""
    hf, dtype = reader.config, reader.dtype(reader.family.embedding)
    shape = ModelShape(reader.family, hf, reader.head_dim)
    config = transformer_config(shape, initialize(), dtype)
    shutdown()
    positions = hf.get("max_position_embeddings", 2048)
    shared = {
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "max_position_embeddings": positions,
        "seq_length": positions,
        "position_embedding_type": "rope" if reader.family.positions is None else "learned_absolute",
        "tokenizer_type": "HuggingFaceTokenizer",
        "iteration": _ITERATION,
        "swiglu": config.gated_linear_unit,
        "params_dtype": dtype,
    }
    return SimpleNamespace(
        **shared,
        model_type="GPT",
        bert_binary_head=False,
        output_layer=not reader.tied,
        linear_bias=config.add_bias_linear,
        qkv_bias=config.add_bias_linear or config.add_qkv_bias,
        norm_has_bias=config.normalization == "LayerNorm",
        previous_tensor_parallel_size=1,
        previous_pipeline_parallel_size=1,
        true_vocab_size=hf["vocab_size"],
        make_vocab_size_divisible_by=None,
        consumed_train_samples=0,
        consumed_valid_samples=0,
        hf_config=str(reader.folder),
        checkpoint_args=argparse.Namespace(
            **shared,
            **_rotary(hf),
            tensor_model_parallel_size=1,
            pipeline_model_parallel_size=1,
            sequence_parallel=False,
            apply_query_key_layer_scaling=False,
            # Fused kernels that only Transformer Engine and Apex have: weights do not depend on them.
            apply_rope_fusion=False,
            gradient_accumulation_fusion=False,
            ffn_hidden_size=config.ffn_hidden_size,
            kv_channels=config.kv_channels,
            num_query_groups=config.num_query_groups,
            group_query_attention=config.num_query_groups != config.num_attention_heads,
            normalization=config.normalization,
            norm_epsilon=config.layernorm_epsilon,
            add_bias_linear=config.add_bias_linear,
            add_qkv_bias=config.add_qkv_bias,
            untie_embeddings_and_output_weights=not reader.tied,
            hidden_dropout=0.0,
            attention_dropout=0.0,
        ),
    )


def _rotary(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Megatron-LM's arguments for rotary embeddings."""
    rope = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    arguments: dict[str, Any] = {"rotary_base": int(rope.get("rope_theta", hf.get("rope_theta", 10000)))}
    if (rope.get("rope_type") or rope.get("type")) == "llama3":
        arguments |= {"use_rope_scaling": True, "rope_scaling_factor": rope["factor"]}
    return arguments
