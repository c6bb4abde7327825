"""A model larger than its process may be goes through every streamed step: sensitivity, head grouping, calibration of
heads and neurons, distillation of a block, export.

A synthetic checkpoint of random weights in bfloat16 is written tensor by tensor, in shards. Then the steps run, each on
what the one before has left on disk, in a process whose private memory (RLIMIT_DATA: heap, stacks and private writable
mappings) is limited, and the most that was resident in each is printed. With ``--whole`` the same process also tries to
load the whole model: it must fail.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import resource
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
from megatron_spd.stages import final_weights, group_plan, make_streamer, write_export

BRANCHES, HEADS, KV_GROUPS, VOCABULARY = 2, 8, 4, 1024
SEQUENCES, LENGTH = 4, 8
#: The block whose attention point is dropped.
BLOCK = 1
STEPS = ("sensitivity", "grouping", "calibration", "distillation", "export")


def main() -> int:
    args = _arguments()
    _small_stacks()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        size = write_model(Path(name) / "model", args.hidden, args.ffn, args.layers)
        chain = Chain(Path(name))
        make_streamer(chain.reader, chain.runtime).unit(0)  # for what the first block that is built imports
        gc.collect()
        before = _status("VmRSS")
        limit = args.limit + (_status("VmData") if args.beyond_libraries else 0)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.getrlimit(resource.RLIMIT_DATA)[1]))
        print(
            f"model: {size / 1e9:.2f} GB in {args.layers} blocks; limit: {limit / 1e9:.2f} GB; "
            f"resident in front of the first step: {before / 1e9:.2f} GB",
            flush=True,
        )
        steps = [*args.steps.split(","), *(["whole"] if args.whole else [])]
        results = [_measured(step, getattr(chain, step)) for step in steps]
        shutdown()
    if args.json:
        print(json.dumps({"model_bytes": size, "limit": args.limit, "before": before, "steps": results}))
    return 0 if all(r["ok"] == (r["step"] != "whole") for r in results) else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--hidden", type=int, default=1408)
    parser.add_argument("--ffn", type=int, default=5632)
    parser.add_argument("--layers", type=int, default=102)
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
        help="the limit is on top of what the process has taken in front of the first step",
    )
    return parser.parse_args()


def _small_stacks() -> None:
    """1 MB for the stack of a thread from now on: a stack counts whole, and gloo has sixty threads that use little."""
    libc, attributes = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    libc.pthread_attr_init(attributes)
    libc.pthread_attr_setstacksize(attributes, ctypes.c_size_t(2**20))
    libc.pthread_setattr_default_np(attributes)


def write_model(folder: Path, hidden: int, ffn: int, layers: int) -> int:
    """A random Llama in shards of at most one block, written tensor by tensor; its bytes."""
    folder.mkdir()
    config = {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_GROUPS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    kv = hidden // HEADS * KV_GROUPS
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


class Chain:
    """The steps for the model ``folder``/model: each returns what shows that it did its work."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.runtime = folder, initialize(1)
        self.reader = CheckpointReader(folder / "model")
        generator = torch.Generator().manual_seed(1)
        self.tokens = torch.randint(VOCABULARY, (SEQUENCES, LENGTH), generator=generator)
        plan = SPDPlan.dense(self.reader.base_model(), BRANCHES).with_drops([2 * BLOCK])
        self.plan = plan.with_block(BLOCK, recovery="grouped+b2b")

    def sensitivity(self) -> dict[str, Any]:
        found = sweep(
            make_streamer(self.reader, self.runtime), self.tokens[:2], BRANCHES, "algorithm1", "attention"
        )
        return {"candidates": len(found["algorithm1"])}

    def grouping(self) -> dict[str, Any]:
        """As published: heads alone."""
        plan = self.plan.with_block(BLOCK, recovery="hg+b2b")
        grouped = group_plan(make_streamer(self.reader, self.runtime), plan, self.tokens)
        return {"kv_group_order": grouped.blocks[BLOCK].kv_group_order}

    def calibration(self) -> dict[str, Any]:
        """Heads together with neurons, and a shift."""
        self.plan, (record,) = calibrate_into(
            make_streamer(self.reader, self.runtime),
            self.plan,
            self.tokens,
            Ingredients(refit=False, norm=False),
            self.folder / "calibrated",
        )
        return {"candidates": {what: list(errors) for what, errors in record["errors"].items()}}

    def distillation(self) -> dict[str, Any]:
        (record,) = distill(
            make_streamer(self.reader, self.runtime, micro_batch=1),
            self.plan,
            self.tokens,
            DistillSettings(EngineSettings(1e-4, 1, 1, 1.0, 0.0, 0.05, 0, "fp32"), 1),
            UnitStore(self.folder / "distilled", "", self.runtime),
            Tracker("none", self.folder),
            final_weights(self.reader, self.plan, calibrated=self.folder / "calibrated"),
        )
        return {"blocks": record["blocks"], "kept": record["kept"]}

    def export(self) -> dict[str, Any]:
        weights = final_weights(self.reader, self.plan, self.folder / "distilled", self.folder / "calibrated")
        write_export(self.reader, self.runtime, self.plan, weights, self.folder / "export")
        files = (self.folder / "export").glob("*.safetensors")
        return {"bytes": sum(file.stat().st_size for file in files)}

    def whole(self) -> dict[str, Any]:
        return {"tensors": len([self.reader.get(name) for name in self.reader.names()])}


def _measured(name: str, step: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What became of a step: ``peak_rss`` in bytes, ``seconds``, and what it returned or the error."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the step before has freed is not this one's
    Path("/proc/self/clear_refs").write_text("5")  # the peak of resident memory starts anew
    result, started = {"step": name, "ok": True}, time.monotonic()
    try:
        result |= step()
    except (MemoryError, RuntimeError, OSError) as caught:
        # Its frames would keep what they hold.
        result |= {"ok": False, "error": f"{type(caught).__name__}: {str(caught).splitlines()[0][:150]}"}
    result |= {"seconds": time.monotonic() - started, "peak_rss": _status("VmHWM")}
    state = "ok" if result["ok"] else f"failed: {result['error']}"
    print(
        f"{name:<13} {result['peak_rss'] / 1e9:6.2f} GB resident  {result['seconds']:6.0f} s  {state}",
        flush=True,
    )
    return result


def _status(name: str) -> int:
    """A figure of /proc/self/status, in bytes."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(status[name].split()[0])


if __name__ == "__main__":
    sys.exit(main())
