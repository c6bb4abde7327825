"""Which sequences a training sees, in which order: the same for any number of replicas and any micro-batch size."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_spd.distill.settings import TrainingSettings


def example_order(sequences: int, count: int, seed: int, own: str = "teacher") -> Tensor:
    """``count`` examples: random passes over ``sequences`` sequences, one after the other, as numbers [count].

    Sequence ``i`` is example ``i`` with the teacher's hidden states in front of it and ``sequences + i`` with the
    student's own. ``own``: "teacher" (none of the student's), "student" (all), or "mixed" (every second place).
    """
    generator = torch.Generator().manual_seed(seed)
    passes = -(-count // sequences)
    order = torch.cat([torch.randperm(sequences, generator=generator) for _ in range(passes)])[:count]
    if own == "student":
        return order + sequences
    if own == "mixed":
        order[1::2] += sequences
    return order


def replica_batches(
    order: Tensor, settings: TrainingSettings, rank: int, replicas: int
) -> list[list[Tensor]]:
    """The examples of replica ``rank`` of ``replicas``: for every optimizer step its micro-batches [b].

    A step takes the next run of ``order`` whatever it is cut into; what is left at the end and does not fill a step is
    not used.
    """
    micro_batch, accumulation = settings.batching()
    whole = micro_batch * accumulation * replicas
    steps = order[: len(order) // whole * whole].split(whole)
    return [list(step[rank::replicas].split(micro_batch)) for step in steps]
