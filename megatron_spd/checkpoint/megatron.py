"""Megatron checkpoints read as if they were Hugging Face folders: whole tensors under Hugging Face names."""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_spd.checkpoint.dist import DistStore
from megatron_spd.checkpoint.hf import CheckpointReader, read_config, sampled
from megatron_spd.checkpoint.legacy import LegacyStore
from megatron_spd.checkpoint.megatron_names import FIRST_ROWS, layer_name
from megatron_spd.checkpoint.megatron_store import (
    TRACKER,
    ParameterStore,
    find_checkpoint,
    is_dist,
    is_legacy,
)
from megatron_spd.checkpoint.safetensors_io import DTYPE_NAMES, TensorEntry, has_weights
from megatron_spd.errors import CheckpointError
from megatron_spd.models.family import OUTPUT_LAYER, OuterTensor
from megatron_spd.models.weights import from_megatron, unshard_block

#: Written beside the weights: the fingerprint that they had.
SOURCE_FILE = "megatron_spd.json"
#: What modules keep beside parameters.
_NO_PARAMETERS = ("_extra_state", "rotary_pos_emb.inv_freq")


class MegatronReader(CheckpointReader):
    """A Megatron checkpoint, torch_dist or ``mp_rank_XX``, plain or SPD, with the methods of a CheckpointReader.

    The model's ``config.json``, plan included, and tokenizer lie beside the weights where this package wrote them;
    otherwise ``hf_config`` names the Hugging Face folder that has them. Tensors are read one at a time. Raises
    CheckpointError as CheckpointReader, and for parameters that the config does not account for.

    Rows of a table of positions that Megatron-core's has no place for (OPT's first two, which only padding reads) lie
    beside the weights where this package wrote them; else they are taken from the weights in ``hf_config``, if there
    are any, or are zeros, with a warning.
    """

    def __init__(self, folder: str | Path, hf_config: str | Path | None = None) -> None:
        found = find_checkpoint(Path(folder))
        store = DistStore(found) if is_dist(found) else LegacyStore(found)
        self._open_store(store, found if hf_config is None else hf_config)

    @classmethod
    def of_store(cls, store: ParameterStore, hf_config: str | Path) -> MegatronReader:
        """A reader of parameters that lie elsewhere; ``hf_config``: the folder with the model's config."""
        reader = cls.__new__(cls)
        reader._open_store(store, hf_config)
        return reader

    def _open_store(self, store: ParameterStore, config_folder: str | Path) -> None:
        self.store = store
        self._read_last: tuple[str, int, Tensor] | None = None
        super().__init__(config_folder)

    @property
    def recorded_fingerprint(self) -> str | None:
        """The fingerprint of the weights when they were written; None where nothing is known of it."""
        file = self.store.folder / SOURCE_FILE
        if not file.is_file():
            return None
        try:
            return str(json.loads(file.read_text(encoding="utf-8"))["fingerprint"])
        except (ValueError, KeyError, TypeError):
            raise CheckpointError(f"{file} has no fingerprint; copy it again") from None

    # ---- what replaces a CheckpointReader's methods -----------------------------------------------------------

    def _read_config(self) -> dict[str, Any]:
        if not (self.folder / "config.json").is_file() and self.folder == self.store.folder:
            raise CheckpointError(
                f"{self.folder} has no config.json beside its weights, as checkpoints of Megatron itself do not; give "
                "the Hugging Face folder of the model as --hf-config"
            )
        return read_config(self.folder)

    def _read_entries(self) -> dict[str, TensorEntry]:
        if self.kv_groups % self.store.ranks:
            raise CheckpointError(
                f"{self.store.folder} is cut for {self.store.ranks} tensor-parallel ranks, which do not divide the "
                f"{self.kv_groups} key/value groups of {self.folder}/config.json; it is another model"
            )
        self._places: dict[str, tuple[int, str] | OuterTensor] = {}
        self._asked: set[str] = set()
        likes: dict[str, Tensor] = {}
        for entry in self.family.outer_tensors(self.tied):
            self._places[entry.name] = entry
            likes[entry.name] = self._outer(entry, meta=True)
        for block in range(self.num_layers):
            wanted = self._block_table(block)
            for part, like in self._block_tensors(block, wanted, meta=True).items():
                name = self.family.block_name(block, part)
                self._places[name] = (block, part)
                likes[name] = like
        self._check_unused()
        return {name: self._as_entry(like) for name, like in likes.items()}

    def _load(self, name: str) -> Tensor:
        place = self._places[name]
        if isinstance(place, OuterTensor):
            return self._outer(place)
        block, part = place
        return self._block_tensors(block, [part])[part].clone(memory_format=torch.contiguous_format)

    def _pieces(self, name: str) -> list[bytes]:
        raw = self._load(name).flatten().view(torch.uint8)
        return [raw[piece.start : piece.stop].numpy().tobytes() for piece in sampled(len(raw))]

    # ---- parameters -------------------------------------------------------------------------------------------

    def parameter(self, name: str, rank: int, meta: bool = False) -> Tensor:
        """Rank ``rank``'s part of a parameter, or with ``meta`` a tensor without data like it. Raises CheckpointError
        where there is none."""
        if name not in self.store.names():
            raise CheckpointError(
                f"{self.store.folder} lacks parameter {name}, which {self.folder}/config.json asks for; it is another "
                "model, or was not copied as a whole"
            )
        if meta:
            self._asked.add(name)
            return self.store.like(name, rank)
        # q, k and v are asked for one after the other.
        if self._read_last is None or self._read_last[:2] != (name, rank) or self.store.ranks > 1:
            self._read_last = (name, rank, self.store.load(name, rank))
        return self._read_last[2]

    def _outer(self, entry: OuterTensor, meta: bool = False) -> Tensor:
        """A tensor of no block. Embedding and output layer may be padded with rows that no token has."""
        if entry.vocabulary:
            parts = [self.parameter(entry.parameter, rank, meta) for rank in range(self.store.ranks)]
            return torch.cat(parts)[: self._positive("vocab_size")].clone()
        whole = self.parameter(entry.parameter, 0, meta)
        return torch.cat([self._first_rows(entry, whole, meta), whole]) if entry.offset else whole

    def _first_rows(self, entry: OuterTensor, rest: Tensor, meta: bool) -> Tensor:
        """The rows in front of ``rest`` in the table ``entry``."""
        if FIRST_ROWS in self.store.names():
            return self.parameter(FIRST_ROWS, 0, meta)
        if meta:
            return rest.new_empty(entry.offset, *rest.shape[1:])
        if self._beside is not None:
            return self._beside.get(entry.name)[: entry.offset].to(rest.dtype)
        warnings.warn(
            f"{self.store.folder} lacks the first {entry.offset} rows of {entry.name}, which only padding reads: they "
            "become zeros; give a Hugging Face folder with weights as --hf-config to take them from there",
            stacklevel=2,
        )
        return rest.new_zeros(entry.offset, *rest.shape[1:])

    @functools.cached_property
    def _beside(self) -> CheckpointReader | None:
        """The model in the folder of the config, if it has weights there."""
        return CheckpointReader(self.folder) if has_weights(self.folder) else None

    def _block_tensors(self, block: int, wanted: Iterable[str], meta: bool = False) -> dict[str, Tensor]:
        """Whole Hugging Face tensors of a block by block-relative name."""
        wanted = list(wanted)
        groups = self.kv_groups // self.store.ranks
        try:
            shards = [
                from_megatron(
                    _LayerState(self, block, rank, wanted, meta), self.family, groups, self.head_dim, wanted
                )
                for rank in range(self.store.ranks)
            ]
        except RuntimeError:
            raise CheckpointError(
                f"{self.store.folder}: parameters of layer {block} do not divide into the {self.heads} heads and "
                f"{self.kv_groups} key/value groups of {self.folder}/config.json; it is another model"
            ) from None
        # Without a plan no block has tensors of branches.
        return unshard_block(shards, self.family, 1 if self.plan is None else self.plan.branches)

    def _check_unused(self) -> None:
        """Raise CheckpointError for a parameter that the model does not have, unless it is a bias of zeros: Megatron
        has one switch for all biases."""
        tied_copy = {OUTPUT_LAYER} if self.tied else set()
        for name in sorted(set(self.store.names()) - self._asked - tied_copy):
            if name.endswith(_NO_PARAMETERS):
                continue
            parts = [self.store.load(name, rank) for rank in range(self.store.ranks)]
            if not name.endswith(".bias") or any(part.any() for part in parts):
                raise CheckpointError(
                    f"{self.store.folder} holds parameter {name}, which {self.folder}/config.json does not account "
                    "for; it is another kind of model"
                )

    def _as_entry(self, like: Tensor) -> TensorEntry:
        dtype = DTYPE_NAMES.get(like.dtype, str(like.dtype))
        return TensorEntry(self.store.folder, dtype, tuple(like.shape), 0, like.nbytes)


def open_checkpoint(folder: Path, hf_config: str | Path | None = None) -> CheckpointReader:
    """The reader for whatever ``folder`` holds: a Hugging Face folder, or a Megatron checkpoint (``hf_config`` as
    there). Raises CheckpointError."""
    is_megatron = (folder / TRACKER).is_file() or is_dist(folder) or is_legacy(folder)
    if (folder / "config.json").is_file() and not is_megatron:
        return CheckpointReader(folder)
    return MegatronReader(folder, hf_config)


class _LayerState(Mapping[str, Tensor]):
    """A rank's parameters of one layer by their names in it, each read when it is asked for."""

    def __init__(self, reader: MegatronReader, block: int, rank: int, wanted: list[str], meta: bool) -> None:
        self._reader, self._block, self._rank, self._meta = reader, block, rank, meta
        self._branch = {entry.name for entry in reader.family.branch_tensors if entry.source in wanted}

    def __getitem__(self, name: str) -> Tensor:
        return self._reader.parameter(layer_name(self._block, name), self._rank, self._meta)

    def __contains__(self, name: object) -> bool:
        """Only branch tensors are ever looked for; all others are there or missed."""
        return name in self._branch

    def __iter__(self) -> Iterator[str]:
        return iter(self._branch)

    def __len__(self) -> int:
        return len(self._branch)
