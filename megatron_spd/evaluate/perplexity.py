"""Perplexity of a model under a plan, one block in memory at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from megatron_spd.calibration.stream import BlockStreamer, BlockVariant, UnitVariants
from megatron_spd.plan import SPDPlan
from megatron_spd.progress import progress_bar


def plan_perplexity(
    streamer: BlockStreamer, plan: SPDPlan, tokens: Tensor, what: str = "perplexity"
) -> tuple[float, int]:
    """Perplexity of ``tokens`` [n, s] under ``plan`` with the weights that ``streamer`` walks, and the tokens scored.

    Every sequence stands alone and is scored from its second token. ``what`` names the progress bar.
    """
    return streamer.perplexity(_final_stream(streamer, plan, tokens, what), tokens)


def plan_nll(
    streamer: BlockStreamer,
    plan: SPDPlan,
    tokens: Tensor,
    what: str = "perplexity",
    variants: UnitVariants | None = None,
) -> Tensor:
    """Sum of -log p, in nats, over the s - 1 scored positions of every sequence of ``tokens`` [n, s]: float64 [n].

    What :func:`plan_perplexity` averages, sequence by sequence; the same on every rank. ``variants``: weights and
    schedules of the plan's units, in place of the streamer's weights under the plan's own schedules.
    """
    return streamer.sequence_nll(_final_stream(streamer, plan, tokens, what, variants), tokens)


def _final_stream(
    streamer: BlockStreamer, plan: SPDPlan, tokens: Tensor, what: str, variants: UnitVariants | None = None
) -> Sequence[Tensor]:
    """The stream behind the last block."""
    x: Sequence[Tensor] = streamer.embed(tokens)
    pending: Sequence[Tensor | None] = [None] * len(x)
    units = {u.start: plan.points_in(u) for u in plan.units()}
    own: Mapping[int, BlockVariant] = {}
    with progress_bar(streamer.runtime, what, plan.num_layers, "block") as bar:
        for block in range(plan.num_layers):
            if variants is not None and block in units:
                own = variants(units[block])
            variant = own.get(block) or BlockVariant(plan.block_schedule(block))
            if variant.schedule.is_stock:
                x = streamer.advance(block, x)
            else:
                x, pending = streamer.advance_pending(block, variant.schedule, x, pending, variant.own)
            bar.update()
    return x
