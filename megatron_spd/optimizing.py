"""The cheapest plan over drop, low-bit and full that keeps an accuracy: from a sensitivity measurement to a plan, as
``planning.py``, for ``--collectives``. Called on all ranks.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from megatron_spd import stages
from megatron_spd.checkpoint.hf import CheckpointReader
from megatron_spd.collective import FULL, NONE
from megatron_spd.latency.bounds import LinkSpeed
from megatron_spd.latency.costs import Serving, byte_costs
from megatron_spd.options import OptimizeOptions
from megatron_spd.plan import BaseModel, SPDPlan
from megatron_spd.planning import Choice, SetSearch, choose_plan, read_scores, with_recovery
from megatron_spd.sensitivity.cheapest import CheapestResult, MeasuredChoice, damage_limit
from megatron_spd.sensitivity.neighbours import typical
from megatron_spd.sensitivity.optimize import PlanOptimizer
from megatron_spd.sensitivity.search import log_increases
from megatron_spd.sensitivity.tiers import NEIGHBOUR_PRICES, low_bit_scores

_PROMPT_TOKENS = 128


def choose_or_optimize(
    reader: CheckpointReader,
    branches: int,
    sensitivity: Mapping[str, Any],
    options: OptimizeOptions,
    search: SetSearch | None = None,
) -> Choice:
    """``planning.choose_plan``, or with ``--collectives`` :func:`optimize_plan`, for the model in ``reader``."""
    base, name = reader.base_model(), str(reader.folder)
    if not options.formats:
        return choose_plan(base, branches, sensitivity, options, name, search)
    itemsize = stages.activation_bytes(reader)
    return optimize_plan(base, branches, sensitivity, options, name, itemsize, search)


def optimize_plan(
    base: BaseModel,
    branches: int,
    sensitivity: Mapping[str, Any],
    options: OptimizeOptions,
    name: str,
    itemsize: int,
    search: SetSearch | None = None,
) -> Choice:
    """The cheapest plan that ``options.formats`` allow within ``--max-perplexity-increase``.

    ``itemsize``: bytes of an activation element. With ``search`` the plan is the cheapest that was measured to keep the
    limit, without it the cheapest that the single scores predict to. Raises UserError as ``planning.choose_plan``,
    and where the formats were not measured.
    """
    scores, thresholds, _ = read_scores(base, branches, sensitivity, options, name)
    low_bit = low_bit_scores(sensitivity, options.sync_points, options.formats)
    plain, percent = sensitivity["plain_perplexity"], options.max_perplexity_increase
    assert percent is not None  # the options say so
    drops = log_increases(scores, plain)
    optimizer = PlanOptimizer(
        2 * base.num_layers,
        drops,
        {form: log_increases(found, plain) for form, found in low_bit.items()},
        _costs(base, branches, options, itemsize),
        NEIGHBOUR_PRICES.times(typical(drops.values())),
    )
    if search is None:
        chosen, found = optimizer.cheapest(damage_limit(percent)), None
    else:
        found = search.cheapest(optimizer, percent)
        chosen = found.best.collectives
    plan = dataclasses.replace(SPDPlan.dense(base, branches), sync_points=list(chosen))
    plan = with_recovery(plan, scores, thresholds, options)
    return Choice(plan, thresholds, optimized=_record(options, optimizer, plan, found))


def _costs(base: BaseModel, branches: int, options: OptimizeOptions, itemsize: int) -> dict[str, float]:
    if options.optimize != "latency":
        return byte_costs(base.hidden_size, itemsize, options.formats)
    assert options.link_rate is not None  # the options say so
    link = LinkSpeed((options.call_latency or 0.0) / 1e3, options.link_rate * 1e9 / 8)
    serving = Serving(options.ranks_served or branches, options.prompt_tokens or _PROMPT_TOKENS, link)
    return serving.costs(base.hidden_size, itemsize, options.formats)


def _record(
    options: OptimizeOptions, optimizer: PlanOptimizer, plan: SPDPlan, found: CheapestResult | None
) -> dict[str, Any]:
    """What ``report/optimized.py`` shows."""
    chosen = tuple(plan.sync_points)
    counts = Counter(chosen)
    return {
        "objective": options.optimize or "bytes",
        "limit": options.max_perplexity_increase,
        "cost": {
            "before": optimizer.cost((FULL,) * len(chosen)),
            "after": optimizer.cost(chosen),
        },
        "points": {what: counts[what] for what in (NONE, *options.formats, FULL)},
        "predicted_increase": 100 * math.expm1(min(optimizer.damage(chosen), 700.0)),
        "measured": None if found is None else _measured(found),
    }


def _measured(found: CheapestResult) -> dict[str, Any]:
    plain = found.plain_perplexity
    return {
        "plain": plain,
        **_figures(found.best),
        "increase": 100 * (found.best.confirmed / plain - 1),
        "history": [_figures(c) for c in found.history],
    }


def _figures(choice: MeasuredChoice) -> dict[str, Any]:
    figures = dataclasses.asdict(choice)
    return {"sync_points": list(figures.pop("collectives")), **figures}
