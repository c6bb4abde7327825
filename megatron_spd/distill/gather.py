"""Full Hugging Face tensors from the shards of a replica's ranks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_spd.distill.engine import whole
from megatron_spd.models.build import ModelShape, layer_shard
from megatron_spd.models.weights import unshard_block
from megatron_spd.runtime.distributed import Runtime


def full_block(
    layer: nn.Module, names: Iterable[str], shape: ModelShape, branches: int, runtime: Runtime
) -> dict[str, Tensor]:
    """A Megatron-core layer's weights, made for G = ``branches``, under their Hugging Face ``names``, on the CPU of the
    first rank of a replica (empty elsewhere), gathered tensor by tensor: a collective of the replica, under ZeRO-3 of
    all replicas."""
    with whole(layer.parameters()):
        shards = layer_shard(layer, names, shape, runtime)
    full: dict[str, Tensor] = {}
    for name, tensor in shards.items():
        tensor = tensor.contiguous()
        if runtime.tp_size == 1 or shape.family.tensor(name).dim is None:
            parts = [tensor]
        else:
            first = dist.get_global_rank(runtime.tp_group, 0)
            parts = [torch.empty_like(tensor) for _ in range(runtime.tp_size)] if runtime.tp_rank == 0 else []
            dist.gather(tensor, parts or None, dst=first, group=runtime.tp_group)
        if runtime.tp_rank == 0:
            full |= unshard_block([{name: p.cpu()} for p in parts], shape.family, branches)
    return full
