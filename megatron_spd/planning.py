"""From a sensitivity measurement to a plan: which points are dropped, and how their blocks are recovered.

Called by the commands and by ``run`` on all ranks, like ``stages.py``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from megatron_spd.calibration.stream import BlockStreamer, UnitVariants
from megatron_spd.collective import FULL
from megatron_spd.errors import UserError
from megatron_spd.grouping.formulas import CALIBRATION_REFUSED
from megatron_spd.models.registry import family_of
from megatron_spd.options import SelectionOptions
from megatron_spd.plan import BaseModel, SPDPlan
from megatron_spd.progress import progress_bar
from megatron_spd.runtime.distributed import Runtime
from megatron_spd.sensitivity.cheapest import CheapestResult, CheapestSearch
from megatron_spd.sensitivity.measure import SetMeasurer
from megatron_spd.sensitivity.measured_sets import Collectives, MeasuredCollectives
from megatron_spd.sensitivity.optimize import PlanOptimizer
from megatron_spd.sensitivity.search import Search, SearchResult
from megatron_spd.sensitivity.tiers import (
    Thresholds,
    block_tiers,
    choose_points,
    drop_count,
    find_thresholds,
    points_up_to,
    points_within_budget,
    scores_from,
)

#: Share of the points that is dropped where the user gives no number and any point may be.
DEFAULT_RATIO = 0.5

#: How a block of each tier is recovered (method section 2); ISB, SB, ESB.
_RECOVERY: dict[str, dict[str, str]] = {
    "zs": {"ISB": "zs", "SB": "zs", "ESB": "zs"},
    "paper": {"ISB": "zs", "SB": "b2b", "ESB": "hg+b2b"},
    "grouped": {"ISB": "grouped", "SB": "grouped", "ESB": "grouped"},
    "full": {"ISB": "grouped", "SB": "grouped+b2b", "ESB": "grouped+b2b"},
}


_Asked = TypeVar("_Asked")
_Figures = TypeVar("_Figures")
_Found = TypeVar("_Found")


@dataclass(frozen=True)
class SetSearch:
    """Searches over real measurements; ``state``: file in which they are kept. Calls are collectives."""

    runtime: Runtime
    measurer: SetMeasurer
    budget: int
    state: Path | None
    identity: str

    def run(
        self,
        scores: Mapping[int, float],
        plain: float,
        task: Callable[[Search], SearchResult],
        confirm: bool = False,
    ) -> SearchResult:
        """The result of ``task`` on a search that starts from ``scores`` (point -> rise over ``plain``). It runs on the
        main rank; the others measure along with it. Its own text may be another than that of the scores: they are
        taken relative to the plain perplexity. ``confirm``: the perplexity itself has to keep a limit too."""
        # Confirmed figures are others: they have a file of their own.
        state = self.state.with_suffix(".limit.json") if confirm and self.state else self.state

        def work(measure: Callable[[tuple[int, ...]], float], bar: Any) -> SearchResult:
            own = measure(())
            scaled = {point: score * own / plain for point, score in scores.items()}
            search = Search(scaled, measure, own, self.budget, state, self.identity, lambda _: bar.update())
            return task(search)

        return self._led(self.measurer.with_perplexity if confirm else self.measurer, work)

    def cheapest(self, optimizer: PlanOptimizer, max_increase_percent: float) -> CheapestResult:
        """The cheapest choice of ``optimizer`` of which both figures keep a limit; run as :meth:`run` is."""
        state = None if self.state is None else self.state.with_suffix(".collectives.json")

        def work(measure: Callable[[Collectives], tuple[float, float]], bar: Any) -> CheapestResult:
            store = MeasuredCollectives(state, self.identity)
            own, _ = measure((FULL,) * optimizer.num_points)
            search = CheapestSearch(optimizer, measure, own, self.budget, store, lambda _: bar.update())
            return search.within(max_increase_percent)

        return self._led(self.measurer.collectives, work)

    def _led(
        self,
        measurer: Callable[[_Asked], _Figures],
        work: Callable[[Callable[[_Asked], _Figures], Any], _Found],
    ) -> _Found:
        """What ``work``, given a measurement for all ranks and a progress bar, finds on the main rank; the others
        measure along. The same on every rank."""
        runtime = self.runtime
        if not runtime.is_main:
            while (asked := runtime.from_main(None)) is not None:
                measurer(asked)
            return runtime.from_main(None)

        others_wait = True

        def measure(asked: _Asked) -> _Figures:
            nonlocal others_wait
            others_wait = False
            figures = measurer(runtime.from_main(asked))
            others_wait = True
            return figures

        try:
            with progress_bar(runtime, "search", self.budget, "set") as bar:
                found = work(measure, bar)
        finally:
            # An error in a measurement has ended the other ranks as well.
            if others_wait:
                runtime.from_main(None)
        return runtime.from_main(found)


def make_search(
    streamer: BlockStreamer,
    branches: int,
    variants: UnitVariants,
    tokens: Tensor,
    budget: int,
    state: Path | None,
    grouping: str,
) -> SetSearch:
    """A search whose sets are measured on ``tokens`` [n, s] with ``variants``; ``grouping`` says how those are made."""
    dense = SPDPlan.dense(streamer.reader.base_model(), branches)
    facts = [dense.base_model.fingerprint, branches, str(streamer.dtype), grouping, "kl"]
    identity = hashlib.sha256(json.dumps(facts).encode() + tokens.numpy().tobytes()).hexdigest()
    measurer = SetMeasurer(streamer, variants, dense, tokens)
    return SetSearch(streamer.runtime, measurer, budget, state, identity)


@dataclass(frozen=True)
class Choice:
    """A chosen plan, the thresholds of its tiers, and, JSON-able, what the search measured on the way, or what an
    optimised plan saves (see ``report/optimized.py``); None without."""

    plan: SPDPlan
    thresholds: Thresholds
    search: dict[str, Any] | None = None
    optimized: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "plan": self.plan.to_dict(),
            "thresholds": dataclasses.asdict(self.thresholds),
            "search": self.search,
            "optimized": self.optimized,
        }

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Choice:
        return cls(
            SPDPlan.from_dict(raw["plan"]),
            Thresholds(**raw["thresholds"]),
            raw["search"],
            raw.get("optimized"),
        )


def choose_plan(
    base: BaseModel,
    branches: int,
    sensitivity: Mapping[str, Any],
    options: SelectionOptions,
    name: str,
    search: SetSearch | None = None,
) -> Choice:
    """The plan that ``options`` make of a sensitivity measurement.

    Points: a ratio or count of the least sensitive ones, or a perplexity budget; if none is given, half of all points,
    or, of attention points, all but the extremely sensitive. With ``search`` the set is the best that was measured,
    without it the one that the single scores predict. Sets are measured with full collectives; those of the kept points
    are set afterwards. Raises UserError if the measurement is of another model or G, or
    lacks scores.
    """
    scores, thresholds, count = read_scores(base, branches, sensitivity, options, name)
    plain, percent = sensitivity["plain_perplexity"], options.max_perplexity_increase
    found: SearchResult | None = None
    if search is not None and percent is not None:
        limit = percent
        found = search.run(scores, plain, lambda s: s.largest_within(limit), confirm=True)
    elif search is not None:
        found = search.run(scores, plain, lambda s: s.best_of_size(count))
    if found is not None:
        dropped = list(found.points)
    elif percent is not None:
        dropped = points_within_budget(scores, plain, percent, options.sync_points != "attention")
    else:
        dropped = choose_points(scores, count, options.sync_points != "attention")
    plan = SPDPlan.dense(base, branches).with_drops(dropped).with_collectives(*options.kept_collectives or ())
    plan = with_recovery(plan, scores, thresholds, options)
    return Choice(plan, thresholds, None if found is None else dataclasses.asdict(found))


def with_recovery(
    plan: SPDPlan, scores: Mapping[int, float], thresholds: Thresholds, options: SelectionOptions
) -> SPDPlan:
    """``plan`` with the tier of every block in which something is dropped, and how ``--recovery`` treats it; in a model
    with experts, with ``--routing``. Raises UserError for options that do not fit the model."""
    treatment = _RECOVERY[options.recovery]
    model_type = plan.base_model.model_type
    if family_of(model_type).tables.experts:
        if options.grouped:
            raise UserError(CALIBRATION_REFUSED.format(model_type))
        treatment = treatment | {"ESB": treatment["SB"]}
        plan = dataclasses.replace(plan, routing=options.routing)
        plan = plan.with_provenance(head_grouping="not done: the published one knows no experts")
    elif options.routing != "branch":
        raise UserError(f"--routing is for models with experts; {model_type} has none")
    for block, tier in block_tiers(scores, plan.dropped, thresholds).items():
        plan = plan.with_block(block, tier=tier, recovery=treatment[tier])
    return plan


def read_scores(
    base: BaseModel, branches: int, sensitivity: Mapping[str, Any], options: SelectionOptions, name: str
) -> tuple[dict[int, float], Thresholds, int]:
    """The scores that ``options`` choose by, the thresholds of the tiers, and how many points a ratio or count drops.

    Raises UserError as :func:`choose_plan` does, and ValueError, KeyError or TypeError for what is no measurement:
    before a search, whose sets take long to measure.
    """
    _check_measurement(base, branches, sensitivity, name)
    scores = scores_from(sensitivity, options.sync_points)
    if options.tau1 is not None and options.tau2 is not None:
        thresholds = Thresholds(options.tau1, options.tau2)
    else:
        thresholds = find_thresholds(scores)
    count = _count(scores, options, thresholds)
    if count > len(scores):
        raise UserError(f"{count} sync points to drop; the sensitivities cover {len(scores)}")
    return scores, thresholds, count


def _check_measurement(base: BaseModel, branches: int, sensitivity: Mapping[str, Any], name: str) -> None:
    base.check_branches(branches)
    if sensitivity.get("fingerprint") not in (None, base.fingerprint):
        raise UserError(
            f"the sensitivity file is of another model than {name}; measure again with `megatron-spd sensitivity`"
        )
    if sensitivity["branches"] != branches:
        raise UserError(
            f"the sensitivity file was measured with G = {sensitivity['branches']}, not G = {branches}; measure again"
        )


def _count(scores: Mapping[int, float], options: SelectionOptions, thresholds: Thresholds) -> int:
    """How many points to drop."""
    if options.drop_count is not None:
        return options.drop_count
    if options.drop_ratio is not None:
        return drop_count(len(scores), options.drop_ratio)
    if options.sync_points == "attention":
        return len(points_up_to(scores, thresholds.tau2))
    return drop_count(len(scores), DEFAULT_RATIO)
