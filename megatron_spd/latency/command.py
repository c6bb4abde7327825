"""The options of the command ``bench`` turned into variants, workloads and networks."""

from __future__ import annotations

import os
from typing import Any

from megatron_spd.checkpoint.hf import CheckpointReader
from megatron_spd.config import BenchOptions
from megatron_spd.errors import UserError
from megatron_spd.latency.benchmark import Settings, run_benchmark
from megatron_spd.latency.link import enter_network
from megatron_spd.latency.measure import Workload
from megatron_spd.latency.variants import make_variants, read_plans
from megatron_spd.models.build import DTYPES
from megatron_spd.options import parts
from megatron_spd.plan import SPDPlan
from megatron_spd.runtime.cpu import keep_freed_memory
from megatron_spd.runtime.distributed import initialize, shutdown


def bench_model(options: BenchOptions) -> tuple[dict[str, Any], bool]:
    """Run the benchmark on this rank: the result (``report/latency.py``), and whether this rank is the one that writes.

    Raises UserError for plans that do not fit the model or the ranks, and where links cannot be shaped.
    """
    reader = CheckpointReader(options.model)
    plain = SPDPlan.dense(reader.base_model(), options.branches or options.ranks)
    plans = read_plans(parts(options.plans or ""), reader)
    if reader.plan is not None:
        plans.insert(0, (reader.folder.name, reader.plan))
    variants = make_variants(plain, parts(options.drops), parts(options.collectives), plans)
    for variant in variants:
        variant.plan.check_ranks(options.ranks)
    if options.rate_values:
        if options.ranks == 1:
            raise UserError("--link-rates needs a link between ranks: give --ranks 2 or more")
        enter_network(int(os.environ["RANK"]), options.ranks, options.ranks_per_node)
    works = [Workload(b, s, options.new_tokens) for b in options.batch_values for s in options.prompt_values]
    settings = Settings(
        works,
        options.rate_values,
        options.rounds,
        DTYPES[options.dtype],
        options.seed,
        ranks_per_node=options.ranks_per_node,
    )
    runtime = initialize(seed=options.seed)
    keep_freed_memory()
    result = {"model": options.model, **run_benchmark(reader, variants, settings, runtime)}
    shutdown()
    return result, runtime.is_main
