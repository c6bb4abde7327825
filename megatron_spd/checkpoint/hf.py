"""Hugging Face folders, plain or SPD exports: checked as a whole when opened, then read one tensor at a time.

A reader of a 70B model holds no more than the tensors it was asked for.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_spd.checkpoint.safetensors_io import (
    INDEX_NAME,
    SINGLE_NAME,
    TORCH_DTYPES,
    ShardWriter,
    TensorEntry,
    read_header,
    read_tensor,
)
from megatron_spd.errors import CheckpointError, PlanError, UserError
from megatron_spd.models.family import POSITIONS, BlockSettings, ModelFamily
from megatron_spd.models.norm import Norm
from megatron_spd.models.registry import family_of
from megatron_spd.models.tables import HFTensor
from megatron_spd.plan import BaseModel, SPDPlan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["CheckpointReader", "ShardWriter", "all_finite", "read_config"]

#: Computed by every loader from the config; old checkpoints store it all the same.
_IGNORED_SUFFIX = ".rotary_emb.inv_freq"
#: How much of each tensor enters the fingerprint: this many pieces of this many bytes, evenly spaced.
_SAMPLE_PIECES, _SAMPLE_BYTES = 8, 512


def all_finite(tensor: Tensor) -> bool:
    """Whether a non-empty tensor holds neither NaN nor infinity: one pass without temporaries, several times faster
    than ``torch.isfinite(tensor).all()``, which matters where every weight of a model is checked."""
    low, high = torch.aminmax(tensor)  # a NaN anywhere makes both NaN
    return bool(torch.isfinite(low) & torch.isfinite(high))


def sampled(length: int) -> list[range]:
    """The pieces of a tensor of ``length`` bytes that enter the fingerprint: offsets from its start."""
    size = min(_SAMPLE_BYTES, length)
    last = length - size
    starts = (last * i // (_SAMPLE_PIECES - 1) for i in range(_SAMPLE_PIECES))
    return [range(start, start + size) for start in starts]


def read_config(folder: Path) -> dict[str, Any]:
    """The parsed ``config.json`` of a model folder. Raises CheckpointError if there is none or it is not JSON."""
    if not folder.is_dir():
        raise CheckpointError(
            f"no model folder at {folder}; give a Hugging Face folder (config.json and safetensors)"
        )
    file = folder / "config.json"
    if not file.is_file():
        raise CheckpointError(
            f"{folder} has no config.json; give a Hugging Face folder (config.json and safetensors)"
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON ({error}); copy or download it again") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} holds a {type(config).__name__}, expected a JSON object")
    return config


class CheckpointReader:
    """A model folder, plain or SPD export, single file or shards.

    Opening it checks everything that can be checked without reading weights: config, family, plan, file sizes, and the
    name, shape and dtype of every tensor. Raises CheckpointError or UserError (one line naming the file or tensor),
    PlanError for a plan that is of another version or does not fit the config.

    Attributes: ``folder``; ``config`` (config.json); ``family``; ``settings`` (what its config says about a block);
    ``plan`` (of an export, else None); ``head_dim``; ``tied`` (the output layer is the embedding and not stored).
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.config = self._read_config()
        self.family: ModelFamily = family_of(self.config.get("model_type"), str(self.folder))
        if self.config.get("quantization_config"):
            raise CheckpointError(f"{self.folder} is quantised; give the unquantised checkpoint")
        self.tied = self.family.is_tied(self.config)
        self.num_layers = self._positive("num_hidden_layers")
        self.hidden_size = self._positive("hidden_size")
        self.heads = self._positive("num_attention_heads")
        self.kv_groups = self._positive("num_key_value_heads", default=self.heads)
        self.head_dim = self._positive("head_dim", self.family.head_dim or self.hidden_size // self.heads)
        self.ffn = self._positive(self.family.ffn_key)
        self.settings = self._read_settings()
        self.plan = self._read_plan()
        self._entries = self._read_entries()
        self._check_tensors()
        self._fingerprint = ""

    # ---- what it holds ----------------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """Full names of all tensors of the model, in file order."""
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header."""
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype of a tensor, from the header."""
        return TORCH_DTYPES[self._entry(name).dtype]

    def block_names(self, block: int) -> list[str]:
        """Block-relative names of the tensors of block ``block`` (0..L-1), branch tensors included."""
        return [
            name for name in self._block_table(block) if self.family.block_name(block, name) in self._entries
        ]

    def outer_names(self) -> list[str]:
        """Full names of the tensors that belong to no block: what stands in front of the blocks, then the rest."""
        return list(self._outer_shapes())

    def final_norm(self) -> Norm:
        """The norm behind the last block, in its stored dtype. Raises CheckpointError as :meth:`get`."""
        family = self.family
        bias = None if family.final_norm_bias is None else self.get(family.final_norm_bias)
        return Norm(family.norm, self.settings.norm_eps, self.get(family.final_norm), bias)

    def output_table(self) -> Tensor:
        """The rows of the output layer [vocabulary, h]. Raises CheckpointError as :meth:`get`."""
        return self.get(self.family.embedding if self.tied else self.family.output_layer)

    def get(self, name: str, check_finite: bool = True) -> Tensor:
        """A copy of one tensor in its stored dtype, on the CPU.

        Raises CheckpointError for an unknown name and, with ``check_finite``, for NaN or infinity in it.
        """
        entry = self._entry(name)
        tensor = self._load(name)
        if check_finite and not all_finite(tensor):
            bad = int((~torch.isfinite(tensor)).sum())
            raise CheckpointError(
                f"tensor {name} in {entry.file} has {bad} NaN or infinite of {tensor.numel()} values; "
                "the checkpoint is damaged, copy or make it again"
            )
        return tensor

    def block(self, block: int) -> dict[str, Tensor]:
        """All tensors of block ``block`` (0..L-1) by block-relative name, whole, in the checkpoint's order of heads
        and neurons. Raises CheckpointError as :meth:`get`."""
        return {name: self.get(self.family.block_name(block, name)) for name in self.block_names(block)}

    def base_model(self) -> BaseModel:
        """The dense model that a plan for this folder is made for; for an export, the one its plan names."""
        if self.plan is not None:
            return self.plan.base_model
        return BaseModel(
            fingerprint=self.fingerprint(),
            model_type=self.family.model_type,
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_groups,
            intermediate_size=self.ffn,
        )

    def fingerprint(self) -> str:
        """SHA-256 that tells models apart, hex; computed once.

        It covers the config fields that change the function computed, every tensor's name, shape and dtype, and of
        every tensor's bytes at most 8 evenly spaced pieces of 512: a 140 GB model takes a moment, and how it is cut
        into files does not matter. Training changes all of a tensor's values, so a sample is enough to see it; an edit
        of single values between the pieces is not seen.
        """
        if not self._fingerprint:
            digest = hashlib.sha256(json.dumps(self._identity(), sort_keys=True).encode())
            for name in sorted(self._entries):
                entry = self._entries[name]
                digest.update(json.dumps([name, entry.dtype, entry.shape]).encode())
                for piece in self._pieces(name):
                    digest.update(piece)
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The folder's tokenizer. No code from the folder is run. Raises CheckpointError if there is none."""
        from transformers import AutoTokenizer, PreTrainedConfig

        try:
            # Given a config, transformers does not look for one in the folder, whose model type it may not know.
            return AutoTokenizer.from_pretrained(
                self.folder, config=PreTrainedConfig(), local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError, KeyError, TypeError):
            raise CheckpointError(
                f"{self.folder} has no tokenizer that transformers can load; add its tokenizer.json"
            ) from None

    # ---- where it comes from: what a reader of another format replaces, beside `_read_entries` -----------------

    def _read_config(self) -> dict[str, Any]:
        return read_config(self.folder)

    def _load(self, name: str) -> Tensor:
        """A tensor in memory of its own, unchecked."""
        return read_tensor(self._entry(name))

    def _pieces(self, name: str) -> list[bytes]:
        """The parts of a tensor's bytes that enter the fingerprint."""
        entry, pieces = self._entry(name), []
        with entry.file.open("rb") as stream:
            for piece in sampled(entry.end - entry.start):
                stream.seek(entry.start + piece.start)
                pieces.append(stream.read(len(piece)))
        return pieces

    # ---- checks when opened -----------------------------------------------------------------------------------

    def _positive(self, key: str, default: int | None = None) -> int:
        value = self.config.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CheckpointError(
                f"{self.folder}/config.json: {key} is {value!r}, expected a whole number >= 1"
            )
        return value

    def _read_settings(self) -> BlockSettings:
        if self.heads % self.kv_groups:
            raise CheckpointError(
                f"{self.folder}/config.json: num_key_value_heads = {self.kv_groups} does not divide "
                f"num_attention_heads = {self.heads}"
            )
        try:
            return self.family.settings(self.config)
        except UserError as error:
            raise CheckpointError(f"{self.folder}/config.json: {error}") from None

    def _read_plan(self) -> SPDPlan | None:
        raw = self.config.get("spd_plan")
        is_spd = self.config["model_type"] == self.family.spd_model_type
        if raw is None and not is_spd:
            return None
        if raw is None or not is_spd:
            found = "no spd_plan" if raw is None else "an spd_plan"
            raise CheckpointError(
                f"{self.folder}/config.json has {found} but model_type {self.config['model_type']!r}; export it again"
            )
        try:
            plan = SPDPlan.from_dict(raw)
        except PlanError as error:
            raise PlanError(f"{self.folder}/config.json: {error}") from None
        base = plan.base_model
        for what, planned, found_size in (
            ("blocks", base.num_layers, self.num_layers),
            ("hidden size", base.hidden_size, self.hidden_size),
            ("attention heads", base.num_attention_heads, self.heads),
            ("key/value groups", base.num_key_value_heads, self.kv_groups),
            ("MLP neurons", base.intermediate_size, self.ffn),
        ):
            if planned != found_size:
                raise PlanError(
                    f"{self.folder}/config.json: its plan was made for {planned} {what}, the model has {found_size}; "
                    "export it again"
                )
        return plan

    def _read_entries(self) -> dict[str, TensorEntry]:
        index = self.folder / INDEX_NAME
        if not index.is_file():
            single = self.folder / SINGLE_NAME
            if not single.is_file():
                raise CheckpointError(
                    f"{self.folder} has no weights: neither {SINGLE_NAME} nor {INDEX_NAME}; save it as safetensors"
                )
            return self._used(read_header(single))
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = sorted(set(weight_map.values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise CheckpointError(f"{index} has no weight_map of names to files; copy it again") from None
        entries: dict[str, TensorEntry] = {}
        for file in files:
            if Path(file).name != file or not (self.folder / file).is_file():
                raise CheckpointError(f"{index} names {file!r}, which is not in {self.folder}; copy it there")
            found = read_header(self.folder / file)
            entries |= {name: entry for name, entry in found.items() if weight_map.get(name) == file}
        for name, file in weight_map.items():
            if name not in entries:
                raise CheckpointError(
                    f"{index} says that {file} holds {name}, which it does not; copy it again"
                )
        return self._used(entries)

    def _used(self, entries: dict[str, TensorEntry]) -> dict[str, TensorEntry]:
        """Without what loaders compute for themselves, and without the output layer of a tied model."""
        ignored = {self.family.output_layer} if self.tied else set()
        return {
            name: entry
            for name, entry in entries.items()
            if name not in ignored and not name.endswith(_IGNORED_SUFFIX)
        }

    def _block_table(self, block: int) -> list[str]:
        """Block-relative names that block ``block`` must have, by the family's table, the config and the plan."""
        names = [entry.name for entry in self.family.block_tensors(self.settings)]
        if self.plan is not None:
            planned = self.family.planned_branch_tensors(self.plan.blocks[block])
            names += [entry.source for entry in planned]
        return names

    def _expected_shape(self, entry: HFTensor) -> tuple[int, ...]:
        other = self.hidden_size if entry.size == "hidden" else self.head_dim
        experts = self.settings.experts
        if entry.unit == "expert" and experts is not None:
            return (experts.count, other)
        if entry.dim is None or entry.unit is None:
            return (other,)
        sizes = {
            "query": self.heads * self.head_dim,
            "kv": self.kv_groups * self.head_dim,
            "neuron": self.ffn,
            "branch": self.plan.branches if self.plan is not None else 0,
        }
        if entry.name.endswith(".bias"):
            return (sizes[entry.unit],)
        return (sizes[entry.unit], other) if entry.dim == 0 else (other, sizes[entry.unit])

    def _outer_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor that belongs to no block, those in front of the blocks first."""
        family, vocabulary = self.family, self._positive("vocab_size")
        shapes: dict[str, tuple[int, ...]] = {}
        for entry in family.outer_tensors(self.tied):
            if entry.vocabulary:
                shapes[entry.name] = (vocabulary, self.hidden_size)
            elif entry.parameter == POSITIONS:
                rows = self._positive("max_position_embeddings") + entry.offset
                shapes[entry.name] = (rows, self.hidden_size)
            else:
                shapes[entry.name] = (self.hidden_size,)
        return shapes

    def _check_tensors(self) -> None:
        expected = self._outer_shapes()
        for block in range(self.num_layers):
            for name in self._block_table(block):
                full = self.family.block_name(block, name)
                expected[full] = self._expected_shape(self.family.tensor(name))
        for name, shape in expected.items():
            found = self._entries.get(name)
            if found is None:
                raise CheckpointError(
                    f"{self.folder} lacks tensor {name} of shape {list(shape)}; copy it again"
                )
            if found.shape != shape:
                raise CheckpointError(
                    f"tensor {name} in {found.file} has shape {list(found.shape)}, config.json asks for {list(shape)}"
                )
            if found.dtype not in TORCH_DTYPES:
                raise CheckpointError(
                    f"tensor {name} in {found.file} has dtype {found.dtype}, expected one of {list(TORCH_DTYPES)}"
                )
        for name in self._entries:
            if name not in expected:
                raise CheckpointError(
                    f"{self.folder} has tensor {name}, which its config.json does not account for "
                    f"(model_type {self.config['model_type']!r}); it is another kind of model, or damaged"
                )

    # ---- helpers ----------------------------------------------------------------------------------------------

    def _entry(self, name: str) -> TensorEntry:
        if name not in self._entries:
            raise CheckpointError(f"{self.folder} has no tensor {name}")
        return self._entries[name]

    def _identity(self) -> dict[str, Any]:
        """What, beside the weights, makes the model the function it is."""
        identity = {
            "model_type": self.config["model_type"],
            "heads": self.heads,
            "kv_groups": self.kv_groups,
            "head_dim": self.head_dim,
            "tied": self.tied,
            "hidden_act": self.family.activation,
            "rms_norm_eps": self.settings.norm_eps,
            "rope": _rope(self.config) if self.family.positions is None else None,
            "spd_plan": None if self.plan is None else self.plan.to_dict(),
        }
        # Settings that came with later families are named where they matter: fingerprints in older plans stay true.
        if self.settings.window is not None:
            identity["window"] = self.settings.window
        if self.settings.experts is not None:
            identity["experts"] = dataclasses.asdict(self.settings.experts)
        return identity


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """Rotary settings, the same for a config of the old style (``rope_theta``, ``rope_scaling``) and of the new one
    (``rope_parameters``), so that re-saving a model with another transformers keeps its fingerprint."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope["rope_type"] = rope.pop("type", None) or rope.get("rope_type", "default")
    rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    return rope
