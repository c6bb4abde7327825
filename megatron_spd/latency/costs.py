"""What a sync point costs by what runs at it, for a plan that is to be cheap: bytes, or predicted time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from megatron_spd.collective import FULL, NONE, CollectiveFormat
from megatron_spd.comm.lowbit import PLAIN_BELOW, exchanged_bytes
from megatron_spd.latency.bounds import LinkSpeed, bytes_sent


def byte_costs(hidden_size: int, itemsize: int, formats: Iterable[str]) -> dict[str, float]:
    """Bytes that enter a point's all-reduce for each token, by what runs there: nothing, a full all-reduce of elements
    of ``itemsize`` bytes, or one of the low-bit ``formats`` (the mean of both of its steps)."""
    sizes = {name: CollectiveFormat.parse(name).bytes_per_value for name in formats}
    return {name: hidden_size * size for name, size in {NONE: 0.0, FULL: float(itemsize), **sizes}.items()}


@dataclass(frozen=True)
class Serving:
    """What a plan is to be fast for: a prompt of ``prompt_tokens`` tokens on ``ranks`` ranks joined by ``link``."""

    ranks: int
    prompt_tokens: int
    link: LinkSpeed

    def costs(self, hidden_size: int, itemsize: int, formats: Iterable[str]) -> dict[str, float]:
        """Predicted seconds of a point's collectives while the prompt is read, by what runs there.

        A full all-reduce is one call. A low-bit one is two, and a full one where the message of ``itemsize`` bytes for
        each value is below :data:`~megatron_spd.comm.lowbit.PLAIN_BELOW`. The time of packing is not counted.
        """
        values = self.prompt_tokens * hidden_size
        message = values * itemsize
        full = self.link.seconds(1, bytes_sent("all_reduce", message, self.ranks))
        costs = {NONE: 0.0, FULL: full}
        for name in formats:
            sent = exchanged_bytes(values, self.ranks, CollectiveFormat.parse(name))
            costs[name] = full if message < PLAIN_BELOW else self.link.seconds(2, sent)
        return costs
