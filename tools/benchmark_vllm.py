"""Latency and throughput of models in vLLM, SPD exports or plain ones, against the first one given.

usage: python tools/benchmark_vllm.py --models PLAIN EXPORT... --ranks M --prompt-tokens 128 1024 --requests 1 8

All engines are alive at once and answer in turn; times are vLLM's own. Ratios above 1 mean slower for the two
latencies, faster for tokens per second. On a machine without a GPU give each rank of an engine its cores, as in
VLLM_CPU_OMP_THREADS_BIND="0|1".
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
from pathlib import Path
from typing import Any

from megatron_spd.errors import UserError
from megatron_spd.serving.latency import REST, Load, check, compare, measure


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models", nargs="+", required=True, help="folders; the first is what others are compared with"
    )
    parser.add_argument(
        "--ranks", type=int, default=1, help="tensor-parallel ranks of each engine (default 1)"
    )
    parser.add_argument(
        "--prompt-tokens", type=int, nargs="+", default=[128], help="lengths of prompts (default 128)"
    )
    parser.add_argument("--requests", type=int, nargs="+", default=[1], help="requests at once (default 1)")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens generated for each (default 32)")
    parser.add_argument(
        "--repeats", type=int, default=10, help="batches of each kind from each model (default 10)"
    )
    parser.add_argument(
        "--rest",
        type=float,
        default=REST,
        help=f"seconds before each batch, until the ranks of the last engine no longer spin (default {REST})",
    )
    parser.add_argument("--dtype", default="auto", help="as vLLM's (default: that of the checkpoint)")
    parser.add_argument("--enforce-eager", action="store_true", help="without torch.compile and CUDA graphs")
    parser.add_argument(
        "--kv-cache-mib", type=int, default=512, help="KV cache of each rank of each engine (default 512)"
    )
    parser.add_argument(
        "--engine-args", type=json.loads, default={}, metavar="JSON", help="more arguments of vLLM's LLM"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    return parser


def loads(args: argparse.Namespace) -> list[Load]:
    """Every length of prompts with every number of requests."""
    return [
        Load(prompt_tokens, requests, args.new_tokens)
        for prompt_tokens, requests in itertools.product(args.prompt_tokens, args.requests)
    ]


def start(args: argparse.Namespace) -> list[Any]:
    """An engine for each model."""
    from vllm import LLM

    for model in args.models:
        if not (Path(model) / "config.json").is_file():
            raise UserError(f"no config.json in {model}; give folders of Hugging Face checkpoints")
    settings = {
        "tensor_parallel_size": args.ranks,
        "dtype": args.dtype,
        "enforce_eager": args.enforce_eager,
        "max_model_len": max(args.prompt_tokens) + args.new_tokens,
        "max_num_batched_tokens": max(2048, max(args.requests) * max(args.prompt_tokens)),
        "max_num_seqs": max(args.requests),
        "kv_cache_memory_bytes": args.kv_cache_mib * 2**20,
        # The request metrics that are read here.
        "disable_log_stats": False,
    }
    return [LLM(model, **settings | args.engine_args) for model in args.models]


def run(args: argparse.Namespace, engines: list[Any]) -> dict[str, Any]:
    """Measure, and print a line for each load, model and figure; returns what goes into the JSON object."""
    found = measure(engines, loads(args), args.repeats, args.rest)
    result: dict[str, Any] = {"ranks": args.ranks, "repeats": args.repeats, "loads": []}
    for load, batches in zip(loads(args), found, strict=True):
        print(
            f"{load.requests} x {load.prompt_tokens} prompt tokens, {load.new_tokens} new ones, {args.ranks} rank(s), "
            f"{args.repeats} repeats; median (quartiles)"
        )
        models = []
        for model, engine, own in zip(args.models, engines, batches, strict=True):
            architecture = engine.llm_engine.model_config.architecture
            print(f"  {model} ({architecture})")
            figures = {name: dataclasses.asdict(f) for name, f in compare(batches[0], own).items()}
            for name, figure in figures.items():
                scale, unit = (1, "/s") if name == "tokens_per_second" else (1000, " ms")
                value = _spread({k: v * scale for k, v in figure["values"].items()}, ".4g")
                ratio = _spread(figure["ratios"], ".3f")
                print(f"    {name.replace('_', ' ')}: {value}{unit}, {ratio} of the first")
            models.append({"model": model, "architecture": architecture} | figures)
        result["loads"].append(dataclasses.asdict(load) | {"models": models})
    return result


def _spread(spread: dict[str, float], form: str) -> str:
    return f"{spread['median']:{form}} ({spread['low']:{form}} to {spread['high']:{form}})"


def main() -> int:
    args = options().parse_args()
    try:
        check(loads(args), args.repeats)
        found = run(args, start(args))
    except UserError as error:
        print(f"benchmark_vllm.py: error: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(found))
    return 0


# vLLM starts its ranks by importing this module again.
if __name__ == "__main__":
    sys.exit(main())
