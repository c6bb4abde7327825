"""A model larger than a process may be goes through every streamed step: sensitivity, calibration, one unit of
distillation, export.

A synthetic checkpoint of random weights in bfloat16 is written tensor by tensor, in shards. Then each step runs in a
process of its own whose private memory (RLIMIT_DATA: heap and private writable mappings, not files mapped for reading)
is limited, and the most that was resident is printed. With ``--whole`` a process under the same limit also tries to
load the whole model: it must fail.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_spd.checkpoint.hf import CheckpointReader, ShardWriter
from megatron_spd.compensation import calibrate_into
from megatron_spd.distill.engine import EngineSettings
from megatron_spd.distill.recipe import distill
from megatron_spd.distill.settings import DistillSettings
from megatron_spd.distill.tracking import Tracker
from megatron_spd.distill.units import UnitStore
from megatron_spd.grouping.calibrate import Ingredients
from megatron_spd.plan import SPDPlan
from megatron_spd.runtime.distributed import initialize, shutdown
from megatron_spd.sensitivity.sweep import sweep
from megatron_spd.stages import final_weights, make_streamer, write_export

BRANCHES, HEADS, VOCABULARY = 2, 8, 1024
SEQUENCES, LENGTH = 4, 32
STEPS = ("sensitivity", "calibration", "distillation", "export")


def main() -> int:
    args = _arguments()
    if args.step:
        return _step(args)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        size = write_model(folder / "model", args.hidden, args.ffn, args.layers)
        print(
            f"model: {size / 1e9:.2f} GB in {args.layers} blocks; limit: {args.limit / 1e9:.2f} GB",
            flush=True,
        )
        steps = [*args.steps.split(","), *(["whole"] if args.whole else [])]
        results = [_limited(folder, step, args) for step in steps]
    for r in results:
        state = "ok" if r["ok"] else f"failed: {r['error']}"
        print(f"{r['step']:<13} {r['peak_rss'] / 1e9:6.2f} GB resident  {r['seconds']:6.0f} s  {state}")
    if args.json:
        print(json.dumps({"model_bytes": size, "limit": args.limit, "steps": results}))
    return 0 if all(r["ok"] == (r["step"] != "whole") for r in results) else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--ffn", type=int, default=8192)
    parser.add_argument("--layers", type=int, default=50)
    parser.add_argument(
        "--limit", type=lambda g: int(float(g) * 1e9), default=int(2e9), help="GB (default 2)"
    )
    parser.add_argument("--folder", default=None, help="where the model is written and removed again")
    parser.add_argument("--whole", action="store_true", help="also try to load the whole model: must fail")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--steps", default=",".join(STEPS), help="which, with commas between")
    parser.add_argument(
        "--beyond-libraries",
        action="store_true",
        help="the limit is on top of what imported libraries have taken",
    )
    parser.add_argument("--step", help=argparse.SUPPRESS)
    return parser.parse_args()


def write_model(folder: Path, hidden: int, ffn: int, layers: int) -> int:
    """A random Llama in shards of at most one block, written tensor by tensor; its bytes."""
    folder.mkdir()
    config = {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": BRANCHES,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    kv = hidden // HEADS * BRANCHES
    block = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
    shapes = {
        "model.embed_tokens": (VOCABULARY, hidden),
        "model.norm": (hidden,),
        "lm_head": (VOCABULARY, hidden),
    }
    shapes |= {f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in block.items()}
    writer, total = ShardWriter(folder, 2**28), 0
    for name, shape in shapes.items():
        tensor = torch.ones(shape, dtype=torch.bfloat16)
        if len(shape) > 1:
            tensor.normal_(std=1.0 if "embed" in name else shape[-1] ** -0.5)
        writer.add(f"{name}.weight", tensor)
        total += tensor.nbytes
    writer.close()
    return total


def _limited(folder: Path, step: str, args: argparse.Namespace) -> dict[str, Any]:
    command = [
        sys.executable,
        __file__,
        "--folder",
        str(folder),
        "--step",
        step,
        "--limit",
        str(args.limit / 1e9),
    ]
    command += ["--beyond-libraries"] if args.beyond_libraries else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        return {"step": step, "ok": False, "error": done.stderr[-300:], "peak_rss": 0, "seconds": 0.0}
    return dict(json.loads(lines[-1]))


def _step(args: argparse.Namespace) -> int:
    """One step in this process, under the limit, which the libraries that it has loaded count in too."""
    folder, started = Path(args.folder), time.monotonic()
    limit = args.limit + (_status("VmData") if args.beyond_libraries else 0)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    error = ""
    try:
        {"whole": _whole}.get(args.step, lambda f: _run(args.step, f))(folder)
    except (MemoryError, RuntimeError, OSError) as caught:
        error = f"{type(caught).__name__}: {str(caught).splitlines()[0][:150]}"
    result = {"step": args.step, "ok": not error, "error": error, "seconds": time.monotonic() - started}
    result["peak_rss"] = _status("VmHWM")
    print(json.dumps(result), flush=True)
    return 0


def _status(name: str) -> int:
    """A figure of /proc/self/status, in bytes."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(status[name].split()[0])


def _whole(folder: Path) -> None:
    reader = CheckpointReader(folder / "model")
    held = [reader.get(name) for name in reader.names()]
    print(len(held))


def _run(step: str, folder: Path) -> None:
    reader, runtime = CheckpointReader(folder / "model"), initialize(1)
    tokens = torch.randint(VOCABULARY, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(1))
    plan = SPDPlan.dense(reader.base_model(), BRANCHES).with_drops([2]).with_block(1, recovery="grouped+b2b")
    steps: dict[str, Callable[[], Any]] = {
        "sensitivity": lambda: sweep(
            make_streamer(reader, runtime), tokens, BRANCHES, "algorithm1", "attention"
        ),
        "calibration": lambda: calibrate_into(
            make_streamer(reader, runtime),
            plan,
            tokens,
            Ingredients(refit=False, norm=False),
            folder / "calibrated",
        ),
        "distillation": lambda: distill(
            make_streamer(reader, runtime, dtype="bf16", micro_batch=1),
            plan,
            tokens,
            DistillSettings(EngineSettings(1e-4, 1, 1, 1.0, 0.0, 0.05, 1, "bf16"), 1),
            UnitStore(folder / "distilled", "", runtime),
            Tracker("none", folder),
            final_weights(reader, plan),
        ),
        "export": lambda: write_export(
            reader, runtime, plan, final_weights(reader, plan, folder / "distilled"), folder / "export"
        ),
    }
    steps[step]()
    shutdown()


if __name__ == "__main__":
    sys.exit(main())
