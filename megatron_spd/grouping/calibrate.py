"""Calibration of one unit in closed form: head order, neuron orders, shifts, branch norms, re-fits - and the guard.

The unit (blocks joined by dropped MLP points, mostly one block) is walked sublayer by sublayer on the dense model's
hidden states. Two states go along: the dense one, and the unit's own X and P under the rule. Wherever branches read
different inputs, ways of reading (``refit.InputFit``) are fitted, neurons are put where they lose least
(``neurons.py``), heads where the two together lose least (``joint.py``). **An ingredient is kept only where the error
of the synced hidden state on held-out sequences says that it helps** (method section 7): every candidate's error is in
the record.

Data parallel: a rank works on its own sequences with the block's full weights, and only sums of statistics and errors
cross ranks. Every rank returns the same tensors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_spd.calibration.stream import BlockWeights
from megatron_spd.checkpoint.hf import all_finite
from megatron_spd.comm.all_reduce import all_reduce
from megatron_spd.errors import UserError
from megatron_spd.grouping.assignment import assign_neurons
from megatron_spd.grouping.formulas import AttentionSettings, BlockFormulas
from megatron_spd.grouping.heads import group_heads
from megatron_spd.grouping.joint import GroupLosses, group_heads_and_neurons
from megatron_spd.grouping.neurons import ReadingCost, WritingCost
from megatron_spd.grouping.permute import permute_block
from megatron_spd.grouping.refit import InputFit, InputMoments
from megatron_spd.grouping.sample import Chunk, Sample, read_inputs, token_rows, with_bias
from megatron_spd.grouping.shift import MeanDifference, ordinary_tokens
from megatron_spd.models.family import ModelFamily
from megatron_spd.plan import BaseModel, BlockSchedule
from megatron_spd.runtime.distributed import Runtime

#: The projections that read a sublayer's input.
_READERS = {
    "attention": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "mlp": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
}
#: Tokens of all ranks together from which neuron costs are taken: what would take the most time with all of them.
NEURON_TOKENS = 2048


@dataclass(frozen=True)
class Ingredients:
    """What calibration may use. ``heads``: "none", "published" or "joint" (the best of both and the original)."""

    heads: str = "joint"
    neurons: bool = True
    shift: bool = True
    norm: bool = True
    refit: bool = True


@dataclass
class BlockResult:
    """A calibrated block: ``weights`` full tensors in the plan's order, branch tensors included; ``changes`` to its
    BlockPlan; ``errors`` of every candidate, relative to the energy of the dense sublayer's output; ``kept``."""

    weights: dict[str, Tensor]
    changes: dict[str, Any]
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)

    @property
    def record(self) -> dict[str, Any]:
        """The report's view: JSON-able."""
        return {"errors": self.errors, "kept": self.kept}


class UnitCalibrator:
    """Calibrates units of one model. ``weights``: the base model's blocks in their original order."""

    def __init__(
        self,
        weights: BlockWeights,
        family: ModelFamily,
        base: BaseModel,
        settings: AttentionSettings,
        branches: int,
        runtime: Runtime,
        ingredients: Ingredients,
    ) -> None:
        self.weights, self.family, self.base, self.settings = weights, family, base, settings
        self.branches, self.runtime, self.ingredients = branches, runtime, ingredients

    @torch.no_grad()
    def calibrate(
        self, unit: range, schedules: Sequence[BlockSchedule], sample: Sample
    ) -> dict[int, BlockResult]:
        """Results by block. ``sample``: dense hidden states in front of ``unit.start``. Raises UserError where
        activations are not finite."""
        results: dict[int, BlockResult] = {}
        for block, schedule in zip(unit, schedules, strict=True):
            errors: dict[str, float] = {}
            best: _BlockWalk | None = None
            behind = sample
            # One at a time, so that no more than the best and the one at hand are in memory.
            for name, order in self._head_orders(block, schedule, sample).items():
                walk = _BlockWalk(self, block, schedule, order, name)
                states = walk.run(sample)
                errors[name] = walk.final_error
                if best is None or walk.final_error < best.final_error:
                    best, behind = walk, states
            assert best is not None  # the original order is always among them
            sample, results[block] = behind, best.result
            if len(errors) > 1:
                results[block].errors["heads"] = errors
                results[block].kept["heads"] = best.name
        return results

    def _head_orders(
        self, block: int, schedule: BlockSchedule, sample: Sample
    ) -> dict[str, list[int] | None]:
        """Candidate key/value group orders. Heads stay where they are in a block that reads a pending sum: the neurons
        before it have been put where its heads are; and where every branch has one group: neurons find it."""
        orders: dict[str, list[int] | None] = {"original": None}
        movable = schedule.drop_attention and not schedule.pending
        if self.ingredients.heads == "none" or not movable or self.base.num_key_value_heads == self.branches:
            return orders
        dense = self.formulas(self.block_weights(block), 1)
        orders["published"] = self._published_order(dense, sample)
        if self.ingredients.heads == "joint":
            losses = GroupLosses(dense, centred=self.ingredients.shift)
            for rows in token_rows(sample.fit, NEURON_TOKENS // self.runtime.world_size):
                context = dense.context(dense.normed(rows.chunk.dense, "attention")[None])
                u = rows.chunk.dense + dense.project(context, "self_attn.o_proj")[0]
                losses.add(rows.select(with_bias(u, dense, "attention")), rows.select(context))
            tensor = losses.tensor(self.runtime)
            if not np.isfinite(tensor).all():
                raise UserError(_not_finite(block))
            starts = [orders["published"]] if orders["published"] else []
            orders["joint"] = self.runtime.from_main(group_heads_and_neurons(tensor, self.branches, starts))
        return {name: order for name, order in orders.items() if order is None or order != sorted(order)}

    def _published_order(self, dense: BlockFormulas, sample: Sample) -> list[int]:
        """The paper's choice, on the main rank's sequences."""
        order: list[int] | UserError | None = None
        if self.runtime.is_main:
            x = torch.cat([chunk.dense for chunk in sample.fit], 1)
            try:
                order = group_heads(dense.weights, x, self.base, self.branches, self.settings)
            except UserError as error:  # for all ranks: they wait for an answer
                order = error
        order = self.runtime.from_main(order)
        if isinstance(order, UserError):
            raise order
        assert order is not None
        return order

    def block_weights(self, block: int) -> dict[str, Tensor]:
        """The base weights on this rank's device in float32: fits and costs are sums of many small terms."""
        return {n: t.to(self.runtime.device, torch.float32) for n, t in self.weights(block).items()}

    def formulas(self, weights: Mapping[str, Tensor], branches: int | None = None) -> BlockFormulas:
        return BlockFormulas(weights, self.base, self.settings, branches or self.branches)

    def permuted(
        self, weights: Mapping[str, Tensor], kv: Sequence[int] | None, neurons: Sequence[int] | None
    ) -> dict[str, Tensor]:
        return permute_block(weights, self.family, self.base, self.settings.head_dim, kv, neurons)


class _BlockWalk:
    """One block of a unit under one order of its heads."""

    def __init__(
        self,
        calibrator: UnitCalibrator,
        block: int,
        schedule: BlockSchedule,
        kv_order: list[int] | None,
        name: str,
    ) -> None:
        self.calibrator, self.block, self.schedule, self.name = calibrator, block, schedule, name
        self.runtime, self.branches = calibrator.runtime, calibrator.branches
        weights = calibrator.permuted(calibrator.block_weights(block), kv_order, None)
        self.result = BlockResult(weights, {} if kv_order is None else {"kv_group_order": kv_order})
        self.final_error = 0.0
        self._next: BlockFormulas | None = None
        #: Dense states behind the sublayer at hand, by chunk: every candidate is compared with them.
        self._behind: dict[int, Tensor] = {}

    def run(self, sample: Sample) -> Sample:
        """Both sublayers; returns the states behind the block."""
        sample = self._sublayer("attention", self.schedule.drop_attention, sample)
        return self._sublayer("mlp", self.schedule.drop_mlp, sample)

    def _sublayer(self, sublayer: str, drop: bool, sample: Sample) -> Sample:
        self._check_finite(sample)
        dense = self.calibrator.formulas(dict(self.result.weights))
        self._behind = {}
        reading = any(c.pending is not None for c in [*sample.fit, *sample.judge])
        reading = bool(self.runtime.from_main(reading))
        fits = [InputFit(), *(self._fits(sublayer, dense, sample) if reading else ())]
        trials = [_Trial(fit.name, fit, None) for fit in fits]
        # Attention that reads what all read is exact, wherever its output goes.
        differs = reading or (drop and sublayer == "mlp")
        judged = [self._error(sublayer, dense, t, drop, sample.judge) if differs else 0.0 for t in trials]
        best = min(range(len(trials)), key=judged.__getitem__)
        if sublayer == "mlp" and differs and self.calibrator.ingredients.neurons:
            trials.append(self._regrouped(trials[best].fit, dense, drop, reading, sample))
            judged.append(self._error(sublayer, dense, trials[-1], drop, sample.judge))
            best = min(range(len(trials)), key=judged.__getitem__)
        if differs:
            names = [t.name for t in trials]
            self.result.errors[sublayer] = dict(zip(names, judged, strict=True))
            self.result.kept[sublayer] = names[best]
            self.final_error = judged[best]
        own = self._apply(sublayer, trials[best])
        return Sample(
            *(
                [self._advance(sublayer, dense, own, trials[best].fit, drop, c) for c in part]
                for part in (sample.fit, sample.judge)
            )
        )

    def _check_finite(self, sample: Sample) -> None:
        """Raise UserError on every rank if states are not finite. (NaN would count as no ordinary token.)"""
        wrong = torch.zeros(1, device=self.runtime.device)
        for chunk in [*sample.fit, *sample.judge]:
            wrong += not (all_finite(chunk.dense) and all_finite(chunk.branch_inputs()))
        if all_reduce(wrong, self.runtime.world_group).item() > 0:
            raise UserError(_not_finite(self.block))

    # ---- candidates -------------------------------------------------------------------------------------------

    def _fits(self, sublayer: str, dense: BlockFormulas, sample: Sample) -> list[InputFit]:
        """Ways of reading z_g, fitted on the sample."""
        ingredients, device = self.calibrator.ingredients, self.runtime.device
        hidden = self.calibrator.base.hidden_size
        fits, shift = [], None
        if ingredients.shift:
            difference = MeanDifference(self.branches, hidden, device)
            for rows in token_rows(sample.fit):
                difference.add(rows.select(rows.chunk.dense), rows.select(rows.chunk.branch_inputs()))
            shift = difference.mean(self.runtime)
            fits.append(InputFit("shift", shift))
        if ingredients.norm or ingredients.refit:
            moments = InputMoments(self.branches, hidden, device)
            for rows in token_rows(sample.fit):
                z = dense.normed(rows.chunk.dense, sublayer)
                moments.add(
                    rows.select(z),
                    rows.select(read_inputs(dense, sublayer, InputFit(shift=shift), rows.chunk)),
                )
            moments.reduce(self.runtime)
            if ingredients.norm:
                fits.append(moments.norm_fit(shift))
            if ingredients.refit:
                fits.append(moments.full_fit(shift))
        return fits

    def _regrouped(
        self, fit: InputFit, dense: BlockFormulas, drop: bool, reading: bool, sample: Sample
    ) -> _Trial:
        """The neuron order that suits a way of reading."""
        share = NEURON_TOKENS // self.runtime.world_size
        cost = self._writing_cost(dense, sample, share) if drop else None
        if reading:
            reads = ReadingCost(dense, self.branches)
            for rows in token_rows(sample.fit, share):
                z = dense.normed(rows.chunk.dense, "mlp")
                own = rows.select(read_inputs(dense, "mlp", fit, rows.chunk))
                if fit.transform is not None:
                    own = own @ fit.transform.transpose(1, 2)
                reads.add(rows.select(z), own)
            read = reads.cost(self.runtime)
            cost = read if cost is None else read + self._exchange(dense, cost, sample.judge) * cost
        # Neurons move where the MLP reads a branch's own input, or its point is dropped.
        assert cost is not None
        if not bool(torch.isfinite(cost).all()):
            raise UserError(_not_finite(self.block))
        order = assign_neurons(cost.cpu().numpy()).order() if self.runtime.is_main else None
        return _Trial(f"{fit.name} + neurons", fit, self.runtime.from_main(order))

    def _writing_cost(self, dense: BlockFormulas, sample: Sample, tokens: int) -> Tensor:
        cost = WritingCost(dense, self._following(), self.branches)
        for rows in token_rows(sample.fit, tokens):
            z = rows.select(dense.normed(rows.chunk.dense, "mlp"))
            cost.add(dense.activations(z[None]))
        return cost.cost(self.runtime)

    def _following(self) -> BlockFormulas:
        if self._next is None:
            self._next = self.calibrator.formulas(self.calibrator.block_weights(self.block + 1))
        return self._next

    def _exchange(self, dense: BlockFormulas, writing: Tensor, judge: Sequence[Chunk]) -> float:
        """Energy of the next attention's output error for each unit of energy that its branches do not see."""
        branch = torch.arange(len(writing), device=writing.device) * self.branches // len(writing)
        unseen = float(writing.gather(1, branch[:, None]).sum() - writing.sum())

        def error(chunk: Chunk) -> Tensor:
            return self._next_error(self._advance("mlp", dense, dense, InputFit(), True, chunk), chunk)

        return self._error_of(error, judge) / max(unseen, 1e-30)

    # ---- the guard --------------------------------------------------------------------------------------------

    def _error(
        self, sublayer: str, dense: BlockFormulas, trial: _Trial, drop: bool, judge: Sequence[Chunk]
    ) -> float:
        """Squared error of the hidden state behind the sublayer as if synced there, relative to the dense sublayer's
        output; for a dropped MLP point, what the next attention makes of its branches' inputs is added."""
        own = self._changed(sublayer, trial)

        def error(chunk: Chunk) -> Tensor:
            after = self._advance(sublayer, dense, own, trial.fit, True, chunk)
            difference = (after.synced() - after.dense).square().sum(-1)
            if drop and sublayer == "mlp":
                difference = difference + self._next_error(after, chunk)
            return difference

        def size(chunk: Chunk) -> Tensor:
            return (self._dense_after(sublayer, dense, chunk) - chunk.dense).square().sum(-1)

        return self._error_of(error, judge) / max(self._error_of(size, judge), 1e-30)

    def _next_error(self, after: Chunk, chunk: Chunk) -> Tensor:
        """[s, b]: squared error of the next block's attention output with a plain shift, where the MLP point behind
        ``chunk`` is dropped and leaves ``after``."""
        following = self._following()
        inputs, ordinary = after.branch_inputs(), ordinary_tokens(chunk.dense)
        shift = (after.dense - inputs)[:, ordinary].mean(1)
        z = following.normed(inputs + shift[:, None, None], "attention")
        true = following.normed(after.dense, "attention")[None]
        return (following.attention(z).sum(0) - following.attention(true).sum(0)).square().sum(-1)

    def _error_of(self, energy: Callable[[Chunk], Tensor], judge: Sequence[Chunk]) -> float:
        """Mean of ``energy`` [s, b] over the ordinary tokens of all ranks. Raises UserError if it is not finite."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.runtime.device)
        for chunk in judge:
            ordinary = ordinary_tokens(chunk.dense)
            sums[0] += energy(chunk)[ordinary].sum(dtype=torch.float64)
            sums[1] += ordinary.sum()
        total, count = all_reduce(sums, self.runtime.world_group).tolist()
        if not total < float("inf"):
            raise UserError(_not_finite(self.block))
        return total / max(count, 1.0)

    # ---- the rule ---------------------------------------------------------------------------------------------

    def _changed(self, sublayer: str, trial: _Trial) -> BlockFormulas:
        """The block with a trial's order and folded maps."""
        weights: Mapping[str, Tensor] = self.result.weights
        if trial.neuron_order is not None:
            weights = self.calibrator.permuted(weights, None, trial.neuron_order)
        names = tuple(n for n in _READERS[sublayer] if n in weights)
        return self.calibrator.formulas(trial.fit.folded(weights, names))

    def _apply(self, sublayer: str, trial: _Trial) -> BlockFormulas:
        """Make a trial the block's own."""
        own = self._changed(sublayer, trial)
        weights, changes, fit = dict(own.weights), self.result.changes, trial.fit
        if trial.neuron_order is not None:
            changes["neuron_order"] = trial.neuron_order
        values = {"shift": fit.shift, "norm_weight": fit.norm_weight, "norm_bias": fit.norm_bias}
        for entry in self.calibrator.family.branch_tensors:
            value = values.get(entry.name.removeprefix(f"{sublayer}_"))
            if value is not None:
                weights[entry.source] = value
                changes[entry.flag] = True
        self.result = dataclasses.replace(self.result, weights=weights, changes=changes)
        return own

    def _dense_after(self, sublayer: str, dense: BlockFormulas, chunk: Chunk) -> Tensor:
        key = id(chunk)
        if key not in self._behind:
            z = dense.normed(chunk.dense, sublayer)[None]
            self._behind[key] = with_bias(chunk.dense + dense.partial(sublayer, z).sum(0), dense, sublayer)
        return self._behind[key]

    def _advance(
        self, sublayer: str, dense: BlockFormulas, own: BlockFormulas, fit: InputFit, drop: bool, chunk: Chunk
    ) -> Chunk:
        """One step of the rule beside one of the dense block."""
        partial = own.partial(sublayer, read_inputs(own, sublayer, fit, chunk))
        x = with_bias(chunk.x, own, sublayer)
        pending = partial if chunk.pending is None else chunk.pending + partial
        after = Chunk(self._dense_after(sublayer, dense, chunk), x, pending)
        return after if drop else Chunk(after.dense, after.synced())


@dataclass(frozen=True)
class _Trial:
    """A candidate for one sublayer."""

    name: str
    fit: InputFit
    neuron_order: list[int] | None


def _not_finite(block: int) -> str:
    return (
        f"the hidden states in block {block} are not finite on this text: the model's activations overflow or hold "
        "NaN; check the checkpoint"
    )
