"""Latency and throughput of models in vLLM, SPD exports or plain ones, against the first one given.

usage: python tools/benchmark_vllm.py --models PLAIN EXPORT... --ranks M

All engines are alive at once and answer in turn. Ratios above 1 mean slower for the two latencies, faster for tokens
per second. On a machine without a GPU give each rank of an engine its cores, as in VLLM_CPU_OMP_THREADS_BIND="0|1".
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from megatron_spd.errors import UserError
from megatron_spd.serving.latency import Batch, compare, measure


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
    parser.add_argument("--prompt-tokens", type=int, default=128, help="length of each prompt (default 128)")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens generated for each (default 32)")
    parser.add_argument("--requests", type=int, default=1, help="requests at once (default 1)")
    parser.add_argument("--repeats", type=int, default=10, help="batches of each model (default 10)")
    parser.add_argument("--dtype", default="auto", help="as vLLM's (default: that of the checkpoint)")
    parser.add_argument("--enforce-eager", action="store_true", help="without torch.compile and CUDA graphs")
    parser.add_argument(
        "--kv-cache-mib", type=int, default=512, help="KV cache of each rank of each engine (default 512)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    return parser


def start(args: argparse.Namespace) -> list[Any]:
    """An engine for each model."""
    from vllm import LLM

    for model in args.models:
        if not (Path(model) / "config.json").is_file():
            raise UserError(f"no config.json in {model}; give folders of Hugging Face checkpoints")
    length = args.prompt_tokens + args.new_tokens
    return [
        LLM(
            model,
            tensor_parallel_size=args.ranks,
            dtype=args.dtype,
            enforce_eager=args.enforce_eager,
            max_model_len=length,
            max_num_batched_tokens=max(2048, args.requests * args.prompt_tokens),
            max_num_seqs=args.requests,
            kv_cache_memory_bytes=args.kv_cache_mib * 2**20,
            # The request metrics that are read here.
            disable_log_stats=False,
        )
        for model in args.models
    ]


def report(args: argparse.Namespace, batches: list[list[Batch]]) -> dict[str, Any]:
    """Print a line for each model and figure; returns what goes into the JSON object."""
    models = []
    given = {
        name: getattr(args, name) for name in ("ranks", "prompt_tokens", "new_tokens", "requests", "repeats")
    }
    print(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in given.items()))
    for model, own in zip(args.models, batches, strict=True):
        figures = compare(batches[0], own)
        models.append({"model": model} | figures)
        print(model)
        for name, f in figures.items():
            scale, unit = (1, "/s") if name == "tokens_per_second" else (1000, " ms")
            spread = f"quartiles {f['ratio_low']:.3f} to {f['ratio_high']:.3f}"
            value = f"{f['value'] * scale:.4g}{unit}"
            print(f"  {name.replace('_', ' ')}: {value}, {f['ratio']:.3f} of the first ({spread})")
    return given | {"models": models}


def main() -> int:
    args = options().parse_args()
    try:
        found = report(
            args, measure(start(args), args.prompt_tokens, args.new_tokens, args.requests, args.repeats)
        )
    except UserError as error:
        print(f"benchmark_vllm.py: error: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(found))
    return 0


# vLLM starts its ranks by importing this module again.
if __name__ == "__main__":
    sys.exit(main())
