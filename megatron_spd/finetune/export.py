"""From a trained GPTModel, spread over tensor-parallel ranks and pipeline stages, to an SPD export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from torch import Tensor, nn

from megatron_spd.calibration.stream import model_shape
from megatron_spd.checkpoint.export import export, planned_tensors
from megatron_spd.checkpoint.hf import CheckpointReader
from megatron_spd.distill.engine import whole
from megatron_spd.distill.gather import full_block
from megatron_spd.errors import UserError
from megatron_spd.layers.spec import pipeline_plan, stage_blocks
from megatron_spd.models.build import outer_parameters
from megatron_spd.plan import SPDPlan
from megatron_spd.runtime.distributed import Runtime
from megatron_spd.stages import package_versions


def export_trained(
    reader: CheckpointReader, plan: SPDPlan, model: GPTModel, runtime: Runtime, out: Path, **facts: Any
) -> SPDPlan:
    """Write the trained ``model`` (made of ``reader``'s, plain or SPD, by ``build_gpt_model`` under ``plan``) as an SPD
    export; returns the plan in it: points that pipeline stages synced are kept, and its provenance holds ``facts``
    as ``finetune``. A collective of all ranks; weights go to the main rank block by block.

    Raises on every rank what :func:`megatron_spd.checkpoint.export.export` raises for wrong input.
    """
    plan = pipeline_plan(model.config, plan, runtime.pp_group) if runtime.pp_group else plan
    plan = plan.with_provenance(finetune=facts, versions=package_versions())
    problem = None
    weights = _Weights(reader, plan, model, runtime)
    if runtime.dp_rank != 0:
        weights.lend()
    else:
        weights.collect_outer()
        try:
            if runtime.is_main:
                export(reader, plan, weights.block, out, trained=weights.outer.__getitem__)
        except UserError as error:
            problem = str(error)
        # The other ranks send every block, whatever became of the export.
        weights.collect_others()
    problem = runtime.from_main(problem)
    if problem:
        raise UserError(problem)
    return plan


class _Weights:
    """Full tensors on the main rank. What it asks for in order the other ranks of its replica send in order."""

    def __init__(self, reader: CheckpointReader, plan: SPDPlan, model: GPTModel, runtime: Runtime) -> None:
        self.reader, self.plan, self.model, self.runtime = reader, plan, model, runtime
        self.shape = model_shape(reader)
        self.dtype = model.config.params_dtype
        self.mine = stage_blocks(model.config)
        self.outer: dict[str, Tensor] = {}
        self.next = 0
        ends: list[Any] = [self.mine.stop] * runtime.pp_size
        if runtime.pp_size > 1:
            dist.all_gather_object(ends, self.mine.stop, group=runtime.pp_group)
        self.ends: list[int] = ends

    def block(self, block: int) -> dict[str, Tensor]:
        """The full tensors of ``block`` by Hugging Face name, on the main rank; called for every block in order."""
        self.next = block + 1
        shapes = planned_tensors(self.reader, self.plan, block)
        stage = next(i for i, end in enumerate(self.ends) if block < end)
        full: dict[str, Tensor] = {}
        if stage == self.runtime.pp_rank:
            full = full_block(self._layer(block), shapes, self.shape, self.plan.branches, self.runtime)
        return {name: self._to_main(full.get(name), shape, stage) for name, shape in shapes.items()}

    def collect_others(self) -> None:
        """Take part in sending the blocks that :meth:`block` was not called for."""
        for block in range(self.next, self.plan.num_layers):
            self.block(block)

    def lend(self) -> None:
        """On the other replicas: give the first one what ZeRO-3 has put here, in the order in which it asks."""
        own = outer_parameters(self.model, self.reader.family)
        lent = [[parameter] for parameter in own.values()]
        lent += [list(self._layer(block).parameters()) for block in self.mine]
        for parameters in lent:
            with whole(parameters):
                pass

    def _layer(self, block: int) -> nn.Module:
        return self.model.decoder.layers[block - self.mine.start]

    def collect_outer(self) -> None:
        """Fill ``outer`` with what belongs to no block."""
        reader, last = self.reader, self.runtime.pp_size - 1
        own = outer_parameters(self.model, reader.family)
        for entry in reader.family.outer_tensors(reader.tied):
            shape, stage = reader.shape(entry.name), 0 if entry.in_front else last
            full = None
            if stage == self.runtime.pp_rank:
                with whole([own[entry]]):
                    part = own[entry].detach()
                full = self._joined(part)[: shape[0]] if entry.vocabulary else part
                if entry.offset:
                    full = torch.cat([reader.get(entry.name)[: entry.offset].to(full), full])
            self.outer[entry.name] = self._to_main(full, shape, stage)

    def _joined(self, rows: Tensor) -> Tensor:
        """The rows of all tensor-parallel ranks, on every one of them."""
        parts = [torch.empty_like(rows) for _ in range(self.runtime.tp_size)]
        dist.all_gather(parts, rows.contiguous(), group=self.runtime.tp_group)
        return torch.cat(parts)

    def _to_main(self, tensor: Tensor | None, shape: tuple[int, ...], stage: int) -> Tensor:
        """``tensor`` of the first rank of ``stage`` on the main rank's CPU; elsewhere nothing of use."""
        runtime, group = self.runtime, self.runtime.pp_group
        if runtime.tp_rank != 0 or runtime.pp_rank not in (0, stage):
            return torch.empty(0)
        if stage == 0 or group is None:
            return torch.empty(0) if tensor is None else tensor.cpu()
        if tensor is None:
            received = torch.empty(shape, dtype=self.dtype, device=runtime.device)
            dist.recv(received, src=dist.get_global_rank(group, stage), group=group)
            return received.cpu()
        dist.send(
            tensor.to(runtime.device, self.dtype).contiguous(),
            dst=dist.get_global_rank(group, 0),
            group=group,
        )
        return torch.empty(0)
