"""What fine-tuning scripts share: their options, the model and plan they start from, their batches, their errors."""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_spd.calibration.stream import model_shape
from megatron_spd.calibration.text import read_text, token_batches
from megatron_spd.checkpoint.folders import is_free
from megatron_spd.checkpoint.hf import CheckpointReader
from megatron_spd.distill.units import plan_mark
from megatron_spd.errors import UserError
from megatron_spd.finetune.export import export_trained
from megatron_spd.models.build import DTYPES, build_gpt_model
from megatron_spd.options import DataOptions, DType, ModelOptions, option
from megatron_spd.plan import SPDPlan
from megatron_spd.runtime.distributed import Runtime, initialize
from megatron_spd.runtime.failures import as_user_error, one_line
from megatron_spd.runtime.rank_status import hide_cuda_from_cpu_ranks
from megatron_spd.stages import final_weights


@dataclass(frozen=True)
class Session:
    """``model``: this rank's part. ``batches``: of every step, ``held_out``: both this replica's, [n, s + 1]."""

    reader: CheckpointReader
    plan: SPDPlan
    runtime: Runtime
    model: GPTModel
    batches: list[Tensor]
    held_out: Tensor

    @property
    def vocab_size(self) -> int:
        return int(self.reader.config["vocab_size"])

    def export(self, out: str, facts: dict[str, Any]) -> None:
        """Write the trained model, with ``facts`` in its provenance."""
        export_trained(self.reader, self.plan, self.model, self.runtime, Path(out), **facts)


@dataclass(kw_only=True)
class FinetuneOptions(ModelOptions, DataOptions):
    """Train all weights of an SPD model on the next token; write an SPD export."""

    plan: str | None = option("plan for a plain model; an SPD export has its own", None)
    out: str = option("folder of the export to write")
    steps: int = option("optimizer steps", 20)
    batch_size: int = option("sequences in a step, of all replicas together", 4)
    micro_batch_size: int = option("sequences that a rank computes at a time", 1)
    eval_sequences: int = option("held-out pieces of text, behind the others", 4)
    learning_rate: float = option("rate of AdamW", 1e-5)
    weight_decay: float = option("decay of AdamW", 0.0)
    tensor_parallel: int | None = option("M, ranks that share a model; default: all of a stage", None)
    sequence_parallel: bool = option("cut activations along the sequence between segments", False)
    recompute: bool = option("keep the activations of one block at a time", False)
    dtype: DType = option("weights and activations", "fp32")
    seed: int = option("of the order of the text", 0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1:
            raise UserError(f"--steps is {self.steps}; it must be >= 1")

    def overrides(self) -> dict[str, Any]:
        """Of Megatron-core's config."""
        recompute = {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
        return {"sequence_parallel": self.sequence_parallel} | (recompute if self.recompute else {})

    def open(self) -> tuple[CheckpointReader, SPDPlan]:
        """The model and its plan. Raises UserError for a plan of another model, none or two of them, and for an
        output folder that is in use."""
        reader = CheckpointReader(self.model)
        if (reader.plan is None) == (self.plan is None):
            found = "a plain model; give its --plan" if reader.plan is None else "an export; leave --plan out"
            raise UserError(f"{self.model} is {found}")
        plan = reader.plan or SPDPlan.load(str(self.plan))
        plan.check_model(reader.base_model().fingerprint, self.model)
        if not is_free(Path(self.out)):
            raise UserError(f"{self.out} is not empty; give another --out")
        return reader, plan

    def texts(self, reader: CheckpointReader) -> tuple[Tensor, Tensor]:
        """Tokens to train on and held-out ones, [n, s + 1] each."""
        tokenizer, text, length = reader.tokenizer(), read_text(self.data), self.seq_length + 1
        held_out = token_batches(tokenizer, text, self.eval_sequences, length, skip=self.sequences)
        return token_batches(tokenizer, text, self.sequences, length), held_out

    def batches(self, tokens: Tensor, runtime: Runtime) -> Iterator[Tensor]:
        """This replica's sequences of every step; each pass over ``tokens`` goes in another order."""
        share = self.batch_size // runtime.dp_size
        if share * runtime.dp_size != self.batch_size or share % self.micro_batch_size:
            raise UserError(
                f"--batch-size {self.batch_size} does not divide over {runtime.dp_size} replicas in micro-batches of "
                f"{self.micro_batch_size}"
            )
        generator = torch.Generator().manual_seed(self.seed)
        passes = -(-self.steps * self.batch_size // len(tokens))
        order = torch.cat([torch.randperm(len(tokens), generator=generator) for _ in range(passes)])
        for step in order[: self.steps * self.batch_size].split(self.batch_size):
            yield tokens[step.tensor_split(runtime.dp_size)[runtime.dp_rank]]

    def start(self, pipeline_parallel: int = 1, **overrides: Any) -> Session:
        """Join the ranks, build this rank's part of the model, and cut the text."""
        reader, plan = self.open()
        tokens, held_out = self.texts(reader)
        runtime = initialize(self.tensor_parallel, pipeline_parallel=pipeline_parallel)
        if len(held_out) % runtime.dp_size:
            raise UserError(
                f"--eval-sequences {len(held_out)} does not divide over {runtime.dp_size} replicas; give a multiple"
            )
        weights = final_weights(reader, plan)
        shape, dtype = model_shape(reader), DTYPES[self.dtype]
        settings = self.overrides() | overrides
        model = build_gpt_model(shape, plan, weights, reader.get, runtime, dtype, **settings)
        judges = held_out.chunk(runtime.dp_size)[runtime.dp_rank]
        return Session(reader, plan, runtime, model, list(self.batches(tokens, runtime)), judges)

    def identity(self, plan: SPDPlan) -> dict[str, Any]:
        """The options on which the trained weights depend."""
        names = ("model", "data", "sequences", "seq_length", "steps", "batch_size", "learning_rate")
        given = {name: getattr(self, name) for name in (*names, "weight_decay", "dtype", "seed")}
        return given | {"plan": plan_mark(plan)}

    def facts(self, engine: str, before: float, after: float) -> dict[str, Any]:
        """What the export's provenance says of the training: ``engine``, and held-out losses in nats."""
        names = ("data", "steps", "batch_size", "seq_length", "learning_rate", "weight_decay", "seed")
        return {
            "engine": engine,
            "loss_before": before,
            "loss_after": after,
            **{name: getattr(self, name) for name in names},
        }


def run_script(work: Callable[[Sequence[str]], dict[str, Any]]) -> int:
    """Do ``work`` on the command line's arguments in a launched rank; the exit code: 0, 2 for what the user can mend, 1
    for a defect. The main rank prints the result as JSON, or one line about a mistake."""
    hide_cuda_from_cpu_ranks()
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    is_main = os.environ.get("RANK", "0") == "0"
    try:
        result = work(sys.argv[1:])
    except Exception as error:
        mistake = as_user_error(error)
        if mistake is None:
            traceback.print_exc()
            return 1
        if is_main:
            print(f"finetune: {one_line(mistake)}", file=sys.stderr)
        return 2
    if is_main:
        print(json.dumps(result))
    return 0
