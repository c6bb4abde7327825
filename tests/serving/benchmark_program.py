"""Runs ``tools/benchmark_vllm.py`` as a request file says, and asks its engines for text on top."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests.serving.engine_program import ask
from tools.benchmark_vllm import options, run, start

#: Figures of a batch, and where vLLM counts the same.
COUNTED = {
    "first_token": "vllm:time_to_first_token_seconds",
    "between_tokens": "vllm:inter_token_latency_seconds",
}


def main(asked: str, answered: str) -> None:
    request: dict[str, Any] = json.loads(Path(asked).read_text())
    args = options().parse_args(request["arguments"])
    engines = start(args)
    answer = {
        "text": [ask(engine, request["rounds"], request["new_tokens"]) for engine in engines],
        "benchmark": run(args, engines),
        "counted": counted(engines[-1], request["rounds"][0][0], request["new_tokens"]),
    }
    Path(answered).write_text(json.dumps(answer))


def counted(engine: Any, prompt: list[int], new_tokens: int) -> dict[str, list[float]]:
    """The latencies of one request, and the mean of those that vLLM's Prometheus metrics counted meanwhile; and its
    tokens per second, with their number.

    The process has one set of these metrics, that of the last engine.
    """
    from megatron_spd.serving.latency import answer

    before = totals(engine)
    batch = answer(engine, [prompt], new_tokens)
    after = totals(engine)
    found = {}
    for figure, name in COUNTED.items():
        (seconds, number), (seconds_before, number_before) = after[name], before[name]
        found[figure] = [getattr(batch, figure), (seconds - seconds_before) / (number - number_before)]
    found["tokens_per_second"] = [batch.tokens_per_second, float(new_tokens)]
    return found


def totals(engine: Any) -> dict[str, tuple[float, int]]:
    """Sum and number of what vLLM has counted, for each of COUNTED."""
    return {m.name: (m.sum, m.count) for m in engine.get_metrics() if m.name in COUNTED.values()}


# vLLM starts its ranks by importing this module again.
if __name__ == "__main__":
    main(*sys.argv[1:])
