"""The damage of whole sets of dropped and low-bit points, from the hidden states that sets have in common.

Two sets compute the same up to the first block in which they differ. The states in front of every synced block of the
last few sets are kept, and a new set starts from the deepest state that it shares with one of them.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from megatron_spd.calibration.stream import BlockStreamer, BlockVariant, UnitVariants, perplexity_of
from megatron_spd.plan import BlockSchedule, SPDPlan
from megatron_spd.sensitivity.low_bit import check_low_bit_measurable, with_low_bit

#: Sets whose states are kept: the one that a search stands at, and neighbours of it.
TRACES = 3


@dataclass(frozen=True)
class _Unit:
    """Blocks of a set that are not the stock ones: a unit of the plan, or a single block with nothing but low-bit
    points."""

    start: int
    dropped: tuple[int, ...]
    low_bit: tuple[tuple[int, str], ...]


_Units = tuple[_Unit, ...]


@dataclass(frozen=True, eq=False)
class _Trace:
    """A measured set: its units, and the states in front of the blocks at which nothing is pending."""

    units: _Units
    states: dict[int, list[Tensor]]

    def shared(self, units: _Units) -> int:
        """The last block in front of which this set and ``units`` have the same state."""
        differing = set(self.units) ^ set(units)
        return min((unit.start for unit in differing), default=max(self.states))


class SetMeasurer:
    """Measures ``tokens`` [n, s] with exactly the given points dropped or low-bit. Calls are collectives.

    Damage is taken as the divergence from the plain model's predictions, KL(plain || SPD), and given as the perplexity
    that it stands for, plain * exp(KL): what the change of perplexity is in expectation, with a fraction of its noise
    (on 2000 tokens of SmolLM2 single points "gain" up to 0.8 % of perplexity; a divergence never does).
    """

    def __init__(
        self, streamer: BlockStreamer, variants: UnitVariants, dense: SPDPlan, tokens: Tensor
    ) -> None:
        """``dense``: the plan that drops nothing; ``variants``: weights and schedules of units."""
        self._streamer, self._variants, self._dense, self._tokens = streamer, variants, dense, tokens
        plain = _Trace((), {0: streamer.embed(tokens)})
        self._plain: tuple[list[Tensor], float] | None = None
        self._traces: deque[_Trace] = deque([plain], maxlen=TRACES)

    def __call__(self, points: Sequence[int]) -> float:
        """plain perplexity * exp(KL)."""
        return self._equivalent(self.states(points))

    def with_perplexity(self, points: Sequence[int]) -> float:
        """The greater of the former and the set's own perplexity, for a limit that both must keep."""
        return max(self._figures(self.states(points)))

    def collectives(self, sync_points: Sequence[str]) -> tuple[float, float]:
        """plain perplexity * exp(KL), and the perplexity, with ``sync_points`` as in a plan (2L of "none", "full", or
        a low-bit format).

        Raises UserError for low-bit formats under a number of ranks that rounds otherwise than G ranks.
        """
        plan = dataclasses.replace(self._dense, sync_points=list(sync_points))
        if plan.low_bit:
            check_low_bit_measurable(self._streamer, plan.branches, self._tokens)
        return self._figures(self._states_of(plan))

    def states(self, points: Sequence[int]) -> list[Tensor]:
        """The stream behind the last block with exactly ``points`` dropped."""
        return self._states_of(self._dense.with_drops(points))

    def _figures(self, stream: list[Tensor]) -> tuple[float, float]:
        return self._equivalent(stream), self._streamer.perplexity(stream, self._tokens)[0]

    def _equivalent(self, stream: list[Tensor]) -> float:
        if self._plain is None:
            plain = self.states(())
            self._plain = plain, float(self._streamer.sequence_nll(plain, self._tokens).sum())
        plain, nll = self._plain
        kl = float(self._streamer.sequence_kl(stream, plain).sum())
        return perplexity_of((nll + kl) / (self._tokens.numel() - len(self._tokens)))

    def _states_of(self, plan: SPDPlan) -> list[Tensor]:
        units = _units(plan)
        trace = max(self._traces, key=lambda t: t.shared(units))
        first = trace.shared(units)
        states = {block: x for block, x in trace.states.items() if block <= first}
        x = self._run(max(states), {unit.start: unit for unit in units}, states)
        # The trace that was built upon is the set that a search stands at: it outlives rejected neighbours.
        self._traces.remove(trace)
        self._traces.extend([_Trace(units, states), trace])
        return x

    def _run(self, block: int, units: dict[int, _Unit], states: dict[int, list[Tensor]]) -> list[Tensor]:
        """From the state in front of ``block`` to the end; adds the states on the way."""
        x = states[block]
        while block < self._dense.num_layers:
            if block not in units:
                x = self._streamer.advance(block, x)
                block += 1
            else:
                x, block = self._unit(units[block], x)
            states[block] = x
        return x

    def _unit(self, unit: _Unit, x: list[Tensor]) -> tuple[list[Tensor], int]:
        block, low_bit = unit.start, dict(unit.low_bit)
        variants = {block: BlockVariant(BlockSchedule(self._dense.branches))}
        pending: list[Tensor | None] = [None] * len(x)
        for number, variant in (self._variants(unit.dropped) if unit.dropped else variants).items():
            schedule = with_low_bit(variant.schedule, number, low_bit)
            x, pending = self._streamer.advance_pending(number, schedule, x, pending, variant.own)
            block = number + 1
        return x, block


def _units(plan: SPDPlan) -> _Units:
    """What is not stock in ``plan``, by first block."""
    runs = plan.units()
    inside = {block for run in runs for block in run}
    runs += [range(b, b + 1) for b in sorted({p // 2 for p in plan.low_bit} - inside)]
    return tuple(
        _Unit(run.start, plan.points_in(run), tuple((p, c) for p, c in plan.low_bit.items() if p // 2 in run))
        for run in sorted(runs, key=lambda run: run.start)
    )
