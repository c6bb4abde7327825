"""Models from one format to another: Hugging Face folders, Megatron checkpoints, SPD exports. Weights keep their bytes.

What can be converted without computing anything: formats, and between a plain model and an SPD one the order of heads
and neurons. An SPD model becomes a plain one again only if that gives the very weights that its plan was made for.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_spd.checkpoint.dist_model import write_megatron
from megatron_spd.checkpoint.export import spd_config, write_spd_config
from megatron_spd.checkpoint.folders import atomic_folder, copy_side_files
from megatron_spd.checkpoint.hf import CheckpointReader, ShardWriter
from megatron_spd.checkpoint.megatron import MegatronReader
from megatron_spd.checkpoint.view import ModelView, view_of
from megatron_spd.config import ConvertOptions
from megatron_spd.errors import CheckpointError, UserError
from megatron_spd.grouping.permute import inverse_order, permute_block
from megatron_spd.plan import BRANCH_FLAGS, BlockPlan, SPDPlan
from megatron_spd.runtime.distributed import initialize, shutdown

_TRAINED = "b2b"


def convert(options: ConvertOptions) -> dict[str, Any]:
    """Convert ``--input`` to ``--output``. Returns ``output``, ``fingerprint`` and ``branches`` (None: plain).

    Raises UserError, CheckpointError or PlanError where the input is not what it is said to be, where the conversion
    would have to compute something, and where the result would not have the weights that it must have. Nothing is left
    behind then.
    """
    reader = _open(options)
    view = _target(reader, options)
    out = Path(options.output)
    if options.to_format == "megatron":
        fingerprint = write_megatron(view, initialize(), out)
        shutdown()
    else:
        fingerprint = write_folder(view, out)
    return {
        "output": str(out),
        "fingerprint": fingerprint,
        "branches": None if view.plan is None else view.plan.branches,
    }


def write_folder(view: ModelView, out: Path, max_shard_bytes: int = 5 * 1024**3) -> str:
    """Write a model as a Hugging Face folder, an export if it has a plan; returns its fingerprint.

    One tensor at a time is read. Before ``out`` appears its weights are compared, by fingerprint, with those they must
    be. Raises CheckpointError if they differ; UserError if ``out`` holds something or the disk is full.
    """
    reader = view.reader
    with atomic_folder(out) as folder:
        writer = ShardWriter(folder, max_shard_bytes)
        for name in reader.names():
            writer.add(name, view.get(name))
        writer.close()
        copy_side_files(reader.folder, folder)
        if view.plan is not None:
            write_spd_config(folder, view.config)
        else:
            text = json.dumps(view.config, indent=2) + "\n"
            (folder / "config.json").write_text(text, encoding="utf-8")
        fingerprint = CheckpointReader(folder).fingerprint()
        _check_weights(view, fingerprint)
    return fingerprint


def undone(reader: CheckpointReader) -> ModelView:
    """The plain model that an SPD model was made from: heads and neurons back in their places.

    Raises UserError, with the reason, where the plan says that there is no way back.
    """
    plan = reader.plan
    assert plan is not None  # the caller has looked
    vectors = [i for i, block in enumerate(plan.blocks) if _has_vectors(block)]
    if vectors:
        raise UserError(
            f"{reader.folder} cannot become a plain model again: calibration gave block {vectors[0]} shifts or branch "
            "norms and weights re-fitted to them; give the plain model that it was made from"
        )
    config = {key: value for key, value in reader.config.items() if not key.startswith("spd_")}
    config.pop("auto_map", None)
    config |= {"model_type": reader.family.model_type, "architectures": _architectures(reader)}
    return ModelView(reader, config, None, _moved(reader, plan, undo=True))


def planned(reader: CheckpointReader, plan: SPDPlan) -> ModelView:
    """The SPD model that ``plan`` makes of a plain one by moving heads and neurons alone.

    Raises PlanError for a plan of another model; UserError for one that asks for more.
    """
    plan.check_model(reader.fingerprint(), str(reader.folder))
    for i, block in enumerate(plan.blocks):
        if _has_vectors(block) or block.recovery.endswith(_TRAINED):
            what = "shifts, branch norms or re-fits" if _has_vectors(block) else "distillation"
            raise UserError(
                f"the plan asks for {what} in block {i}, which a conversion does not compute; use `megatron-spd "
                "export` with the folders of `group` and `distill`"
            )
    return ModelView(reader, spd_config(reader, plan), plan, _moved(reader, plan, undo=False))


def _open(options: ConvertOptions) -> CheckpointReader:
    """The input, which must be what ``--from`` says."""
    if options.from_format == "megatron":
        return MegatronReader(options.input, options.hf_config)
    if options.hf_config is not None:
        raise UserError("--hf-config is for --from megatron; leave it out")
    reader = CheckpointReader(options.input)
    found = "hf" if reader.plan is None else "spd"
    if found != options.from_format:
        kind = "a plain model" if reader.plan is None else "an SPD export"
        raise UserError(f"{options.input} is {kind}; give --from {found}")
    return reader


def _target(reader: CheckpointReader, options: ConvertOptions) -> ModelView:
    """The model to write: as it is, with ``--plan``, or without its plan."""
    if options.plan is not None:
        if reader.plan is not None or options.to_format == "hf":
            raise UserError("--plan makes an SPD model of a plain one; leave it out here")
        return planned(reader, SPDPlan.load(options.plan))
    if options.to_format == "spd" and reader.plan is None:
        raise UserError(
            f"{options.input} is a plain model; --to spd needs the plan to apply: give it as --plan"
        )
    if options.to_format == "hf" and reader.plan is not None:
        return undone(reader)
    return view_of(reader)


def _has_vectors(block: BlockPlan) -> bool:
    return any(getattr(block, flag) for flag in BRANCH_FLAGS)


def _moved(reader: CheckpointReader, plan: SPDPlan, undo: bool) -> Callable[[str], Tensor]:
    """Tensors by full name with heads and neurons in the plan's order, or with ``undo`` out of it."""
    places = {
        reader.family.block_name(block, name): (block, name)
        for block in range(reader.num_layers)
        for name in reader.block_names(block)
    }

    def get(full: str) -> Tensor:
        tensor = reader.get(full)
        if full not in places:
            return tensor
        block, name = places[full]
        planned = plan.blocks[block]
        orders = [planned.kv_group_order, planned.neuron_order]
        if undo:
            orders = [None if order is None else inverse_order(order) for order in orders]
        moved = permute_block({name: tensor}, reader.family, plan.base_model, reader.head_dim, *orders)
        return moved[name]

    return get


def _check_weights(view: ModelView, fingerprint: str) -> None:
    """Raise CheckpointError unless ``fingerprint`` is that of the weights that the view must have."""
    reader = view.reader
    if reader.plan is not None and view.plan is None:
        if fingerprint != reader.plan.base_model.fingerprint:
            trained = [i for i, b in enumerate(reader.plan.blocks) if b.recovery not in ("", "zs")]
            where = f" (by its plan in block {trained[0]})" if trained else ""
            raise CheckpointError(
                f"{reader.folder} cannot become a plain model again: its weights were changed by training or "
                f"re-fits{where}, putting heads and neurons back does not give those of the model that its plan names"
            )
    elif isinstance(reader, MegatronReader) and view.plan == reader.plan:
        recorded = reader.recorded_fingerprint
        if recorded is not None and recorded != fingerprint:
            raise CheckpointError(
                f"{reader.store.folder} does not hold the weights that were written there (fingerprint "
                f"{fingerprint[:12]}, recorded {recorded[:12]}); copy or convert it again"
            )


def _architectures(reader: CheckpointReader) -> list[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[reader.family.model_type]]
