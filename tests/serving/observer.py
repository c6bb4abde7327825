"""What a test asks of every rank of an engine: methods that vLLM adds to its workers (``worker_extension_cls``)."""

from __future__ import annotations

import contextlib

import torch

from megatron_spd.collective import CollectiveFormat
from megatron_spd.comm.lowbit import simulate_lowbit
from megatron_spd.latency.clock import WallClock
from megatron_spd.latency.collectives import recorded


class Observer:
    """Answers come as a list with one entry for each rank."""

    def start_observing(self) -> None:
        self.observation = contextlib.ExitStack()
        self.recording = self.observation.enter_context(recorded([], WallClock()))

    def stop_observing(self) -> list[tuple[str, int]]:
        """(name, bytes given in) of the collectives of torch.distributed since the start, in order, without those that
        torch.compile has traced. Ranks of one machine may share memory instead."""
        self.observation.close()
        return [(call.name, call.num_bytes) for call in self.recording.calls]

    def sum_is_as_simulated(self, collective: str, tokens: int, hidden: int) -> bool:
        """Whether the sum of random tensors [tokens, hidden], another one on each rank, is bit for bit what one
        process computes of all of them."""
        from vllm.distributed import get_tp_group

        from megatron_spd.serving.vllm.collective import all_reduce_of

        group = get_tp_group()
        partials = torch.randn(group.world_size, tokens, hidden, generator=torch.Generator().manual_seed(0))
        found = all_reduce_of(collective)(partials[group.rank_in_group].clone())
        return torch.equal(found, simulate_lowbit(partials, CollectiveFormat.parse(collective)))
