"""Megatron-LM's checkpoints of one file for each rank, ``mp_rank_TT[_PPP]/model_optim_rng.pt``: read, never written.

``TT`` is the tensor-parallel rank, ``PPP`` the pipeline stage, whose layers are numbered from 0. In an interleaved
pipeline a stage has several chunks of the model ("model0", "model1", ...), each numbered from 0: the first chunks of
all stages are followed by the second ones. The files are pickles: see ``unpickling.py`` for what is read of them.
Tensors are memory-mapped.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_spd.checkpoint.megatron_names import canonical, layer_name, split_layer_name
from megatron_spd.checkpoint.unpickling import load_state
from megatron_spd.errors import CheckpointError

_RANK = re.compile(r"mp_rank_(\d+)(?:_(\d+))?(?:_(\d+))?")
_FILES = ("model_optim_rng.pt", "model_rng.pt")
#: Before this one query, key and value heads lay in another order.
_LEAST_VERSION = 2.0


class LegacyStore:
    """The parameters of a model in a folder of ``mp_rank_...`` folders (a ``ParameterStore``).

    Raises CheckpointError for ranks that are missing, that do not belong together, or hold what is not read here.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        files = _rank_files(folder)
        self.ranks = 1 + max(tensor_rank for tensor_rank, _ in files)
        stages = 1 + max(stage for _, stage in files)
        for tensor_rank in range(self.ranks):
            for stage in range(stages):
                if (tensor_rank, stage) not in files:
                    raise CheckpointError(
                        f"{folder} has files of {self.ranks} tensor-parallel ranks and {stages} pipeline stages, but "
                        f"none of rank {tensor_rank} of stage {stage}; copy it there"
                    )
        _check_sizes(folder, load_state(files[0, 0]).get("args"), self.ranks, stages)
        self._parts = [
            _whole_rank(folder, [_chunks(files[rank, stage]) for stage in range(stages)])
            for rank in range(self.ranks)
        ]
        self._check_parts()

    def names(self) -> Collection[str]:
        return self._parts[0].keys()

    def like(self, name: str, rank: int) -> Tensor:
        return torch.empty_like(self._parts[rank][name], device="meta")

    def load(self, name: str, rank: int) -> Tensor:
        return self._parts[rank][name].clone()

    def _check_parts(self) -> None:
        first = self._parts[0]
        for rank, part in enumerate(self._parts):
            odd = sorted(first.keys() ^ part.keys())
            odd += [name for name in first.keys() & part.keys() if first[name].shape != part[name].shape]
            if odd:
                raise CheckpointError(
                    f"{self.folder}: ranks 0 and {rank} differ in {odd[0]}; they are not of one checkpoint"
                )


def _rank_files(folder: Path) -> dict[tuple[int, int], Path]:
    """The file of each (tensor-parallel rank, pipeline stage)."""
    files: dict[tuple[int, int], Path] = {}
    for inner in sorted(folder.glob("mp_rank_*")):
        match = _RANK.fullmatch(inner.name)
        if match is None or match[3] is not None:
            raise CheckpointError(
                f"{inner} is of a layout that is not read here (mp_rank_TT or mp_rank_TT_PPP); convert it to "
                "torch_dist with Megatron-LM first"
            )
        held = [inner / name for name in _FILES if (inner / name).is_file()]
        if not held:
            raise CheckpointError(f"{inner} has no {_FILES[0]}; copy it there")
        files[int(match[1]), int(match[2] or 0)] = held[0]
    return files


def _whole_rank(folder: Path, stages: list[list[dict[str, Tensor]]]) -> dict[str, Tensor]:
    """A tensor-parallel rank's part of all parameters, by canonical name, from the chunks of its pipeline stages."""
    whole: dict[str, Tensor] = {}
    layers = 0
    if len({len(chunks) for chunks in stages}) > 1:
        raise CheckpointError(
            f"{folder} has pipeline stages of {sorted({len(chunks) for chunks in stages})} model chunks, expected as "
            "many in each; they are not of one checkpoint"
        )
    for part in (part for same in zip(*stages, strict=True) for part in same):
        inside = {name: place for name in part if (place := split_layer_name(name)) is not None}
        for name, tensor in part.items():
            if name not in inside:
                # The last stage of a tied model keeps a copy of the embedding.
                whole.setdefault(name, tensor)
                continue
            layer, rest = inside[name]
            whole[layer_name(layers + layer, rest)] = tensor
        layers += 1 + max((layer for layer, _ in inside.values()), default=-1)
    return whole


def _chunks(file: Path) -> list[dict[str, Tensor]]:
    """The tensors in a rank's file by canonical name, for each chunk of the model; mostly there is one."""
    state = load_state(file)
    version = state.get("checkpoint_version", 0)
    if not isinstance(version, (int, float)) or version < _LEAST_VERSION:
        raise CheckpointError(
            f"{file} is of checkpoint_version {version!r}, expected {_LEAST_VERSION} or newer; save it again with a "
            "newer Megatron-LM"
        )
    numbered = [f"model{i}" for i in range(len(state)) if f"model{i}" in state]
    models = [state.get(name) for name in numbered or ["model"]]
    chunks = [model for model in models if isinstance(model, Mapping)]
    if len(chunks) < len(models):
        raise CheckpointError(f"{file} has no model; copy or save it again")
    return [{canonical(name): tensor for name, tensor in _flat(chunk)} for chunk in chunks]


def _flat(state: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of nested dicts by their joined names; anything else in them is no parameter."""
    for key, value in state.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, Tensor):
            yield f"{prefix}{key}", value


def _check_sizes(folder: Path, args: Any, ranks: int, stages: int) -> None:
    """Raise CheckpointError where the arguments of the run that saved the files tell of other sizes, or of experts
    that are spread over ranks: their files have the same names as those of pipeline stages."""
    spread = getattr(args, "expert_model_parallel_size", 1)
    if spread != 1:
        raise CheckpointError(
            f"{folder} was saved with expert_model_parallel_size = {spread}, expected 1; convert it to torch_dist with "
            "Megatron-LM first"
        )
    for name, found in (("tensor_model_parallel_size", ranks), ("pipeline_model_parallel_size", stages)):
        told = getattr(args, name, found)
        if told != found:
            raise CheckpointError(
                f"{folder} has files for {name} = {found}, but was saved with {told}; copy all of it"
            )
