"""A model on its way from one format to another: a reader's tensors, as they are or in another order of heads and
neurons, and the config that goes with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_spd.checkpoint.export import spd_config
from megatron_spd.checkpoint.hf import CheckpointReader, read_config
from megatron_spd.plan import SPDPlan


@dataclass(frozen=True)
class ModelView:
    """What a writer needs. Tensors have the names, shapes and dtypes that ``reader`` has.

    ``config`` (a config.json) and ``plan`` (None: plain) are those of the model to write; ``get`` gives its tensors by
    full Hugging Face name.
    """

    reader: CheckpointReader
    config: dict[str, Any]
    plan: SPDPlan | None
    get: Callable[[str], Tensor]

    def like(self, name: str) -> Tensor:
        """A tensor without data of the shape and dtype of tensor ``name``."""
        return torch.empty(self.reader.shape(name), dtype=self.reader.dtype(name), device="meta")


def view_of(reader: CheckpointReader) -> ModelView:
    """The model as it is. Code that its config points to elsewhere does not go along."""
    if reader.plan is not None:
        return ModelView(reader, spd_config(reader, reader.plan), reader.plan, reader.get)
    config = {key: value for key, value in reader.config.items() if key != "auto_map"}
    return ModelView(reader, config, None, reader.get)


def stored_plan(folder: Path) -> SPDPlan | None:
    """The plan in a folder's config.json; None for a plain model, and where Megatron itself wrote the folder and no
    config. Raises CheckpointError and PlanError."""
    if not (folder / "config.json").is_file():
        return None
    raw = read_config(folder).get("spd_plan")
    return None if raw is None else SPDPlan.from_dict(raw)
