"""Process groups, device and seeds of one run: the ``Runtime`` that everything else is handed."""

from __future__ import annotations

import gc
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

from megatron_spd.errors import UserError
from megatron_spd.runtime.branch_groups import forget_branch_groups
from megatron_spd.runtime.cpu import prepare_cpu_runtime

#: Longest time in seconds that a rank waits in a collective before it gives up; set MEGATRON_SPD_TIMEOUT to change it.
DEFAULT_TIMEOUT = 900.0


@dataclass(frozen=True)
class Runtime:
    """Where this process stands. ``tp_size`` is M; ``tp_group`` the ranks that share a model (or a pipeline stage of
    one), ``dp_group`` its replicas, ``pp_group`` the stages of a replica (None: there is one)."""

    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    dp_rank: int
    dp_size: int
    device: torch.device
    tp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup
    pp_rank: int = 0
    pp_size: int = 1
    pp_group: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes files and prints."""
        return self.rank == 0

    @property
    def world_group(self) -> dist.ProcessGroup:
        """All ranks, for what is spread over them by sequences alone."""
        group = dist.group.WORLD
        assert group is not None  # a Runtime exists only after initialize()
        return group

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            dist.barrier()

    def from_main(self, value: Any) -> Any:
        """The main rank's ``value`` (anything that pickles) on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]


def initialize(tensor_parallel: int | None = None, seed: int = 1234, pipeline_parallel: int = 1) -> Runtime:
    """Join the process groups (gloo without CUDA, NCCL with it) and seed every generator.

    ``tensor_parallel``: M, default all ranks of a stage; ``pipeline_parallel``: stages. The remaining factor of the
    world size is data parallel. Without a launcher's environment the process is a world of one. It may be
    called again, also with other sizes.

    Raises UserError if the sizes do not divide the number of ranks.
    """
    prepare_cpu_runtime()
    device = _device()
    if not dist.is_initialized():
        _init_process_group(device)
    world = dist.get_world_size()
    stages = pipeline_parallel
    size = world // max(stages, 1) if tensor_parallel is None else tensor_parallel
    if size < 1 or stages < 1 or world % (size * stages):
        pipeline = "" if stages == 1 else f" times {stages} pipeline stages"
        raise UserError(
            f"M = {size} tensor-parallel ranks{pipeline} do not divide the {world} launched ranks"
        )
    _join_model_parallel(size, stages)
    torch.manual_seed(seed)
    tensor_parallel_seed(seed)
    return Runtime(
        rank=dist.get_rank(),
        world_size=world,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=size,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=world // (size * stages),
        device=device,
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        dp_group=parallel_state.get_data_parallel_group(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=stages,
        pp_group=parallel_state.get_pipeline_model_parallel_group(),
    )


def _join_model_parallel(tensor: int, pipeline: int) -> None:
    """Make Megatron-core's groups of these sizes, unless they exist."""
    if parallel_state.model_parallel_is_initialized():
        existing = (
            parallel_state.get_tensor_model_parallel_world_size(),
            parallel_state.get_pipeline_model_parallel_world_size(),
        )
        if existing == (tensor, pipeline):
            return
        _close_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline
    )


def tensor_parallel_seed(seed: int) -> None:
    """Restart the random states that Megatron-core tracks (rank-different inside tensor-parallel regions)."""
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def shutdown() -> None:
    """Leave the process groups, if joined."""
    if parallel_state.model_parallel_is_initialized():
        _close_model_parallel()
    forget_branch_groups()
    if dist.is_initialized():
        dist.destroy_process_group()


def _close_model_parallel() -> None:
    """Destroy Megatron-core's groups. It only forgets them, and each of some twenty keeps its threads running for as
    long as anything refers to it."""
    parallel_state.destroy_model_parallel()
    forget_branch_groups()
    _drop_old_models()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


def _drop_old_models() -> None:
    """Free models that nobody uses any more, and with them the groups that they refer to: rotary embeddings are kept
    by a cache of Megatron-core's, the rest by cycles."""
    RotaryEmbedding.forward.cache_clear()
    gc.collect()


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def _init_process_group(device: torch.device) -> None:
    timeout = timedelta(seconds=float(os.environ.get("MEGATRON_SPD_TIMEOUT", DEFAULT_TIMEOUT)))
    backend = "nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
