"""What a training is asked to do: its amounts, its budgets, and the hash of what decides its weights."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from megatron_spd.distill.engine import EngineSettings, deepspeed_config
from megatron_spd.distill.units import plan_mark
from megatron_spd.errors import UserError
from megatron_spd.plan import SPDPlan

#: Most sequences that judge: what more of them would add to the verdict is not worth the time.
_MOST_HELD_OUT = 16


@dataclass(frozen=True)
class TrainingSettings:
    """What block-to-block distillation and the finishing pass have in common.

    ``engine``: what DeepSpeed gets; ``epochs`` over the training sequences; ``tokens``: instead of them, the
    training tokens that are seen at most (the sequences are gone through again and again until then); ``held_out``:
    share of the sequences that judge (at least one, at most 16); ``max_seconds``: stop training after that.
    """

    engine: EngineSettings
    epochs: int
    tokens: int | None = None
    held_out: float = 0.125
    seed: int = 1234
    max_seconds: float | None = None

    def identity(self, plan: SPDPlan, tokens: Tensor, initial: str = "") -> str:
        """A hash of everything that decides the resulting weights, behind the plan's own mark
        (``units.plan_mark``).

        ``initial``: a name or hash of the weights that students start from, where the plan does not say it all.
        """
        plan_part = {k: v for k, v in plan.to_dict().items() if k != "provenance"}
        settings = dataclasses.asdict(self)
        # A time budget decides when training stops, not what is trained; a continued run may have another.
        settings.pop("max_seconds")
        settings["config_file"] = deepspeed_config(self.engine, 1)
        text = json.dumps([plan_part, settings, initial], sort_keys=True).encode()
        return f"{plan_mark(plan)} {hashlib.sha256(text + tokens.numpy().tobytes()).hexdigest()}"

    def batching(self) -> tuple[int, int]:
        """Micro-batch size and gradient accumulation as DeepSpeed will have them."""
        config = deepspeed_config(self.engine, 1)
        return config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]

    def zero_stage(self) -> int:
        """ZeRO stage as DeepSpeed will have it."""
        return int(deepspeed_config(self.engine, 1)["zero_optimization"].get("stage", 0))

    def held_out_count(self, sequences: int) -> int:
        """How many of ``sequences`` judge; the last ones do."""
        return max(1, min(_MOST_HELD_OUT, round(sequences * self.held_out)))

    def examples(self, sequences: int, length: int) -> int:
        """How many sequences of ``length`` tokens are trained on, where there are ``sequences`` different ones."""
        return sequences * self.epochs if self.tokens is None else self.tokens // length

    def check_amount(self, tokens: Tensor, replicas: int = 1) -> None:
        """Raise UserError unless ``tokens`` [n, s] are enough to hold some out and to make one optimizer step of
        the rest on each of ``replicas`` data-parallel replicas, or if the DeepSpeed config is not usable."""
        micro_batch, accumulation = self.batching()
        n = len(tokens)
        if n < 2:
            raise UserError(f"distillation was given {n} sequence(s); it needs at least 2 (one is held out)")
        training, length = n - self.held_out_count(n), tokens.shape[1]
        whole = micro_batch * accumulation * replicas
        if self.examples(training, length) >= whole:
            return
        step = f"one step of {micro_batch} x {accumulation}"
        if self.tokens is not None:
            raise UserError(
                f"a budget of {self.tokens} tokens is less than {step} pieces of {length} tokens on {replicas} "
                f"replica(s), which takes {whole * length}; give at least that, or a smaller batch"
            )
        raise UserError(
            f"{training} training sequences x {self.epochs} epochs give {training * self.epochs // replicas} to each "
            f"replica, less than {step}; use more sequences or a smaller batch"
        )


@dataclass(frozen=True)
class DistillSettings(TrainingSettings):
    """Block-to-block distillation. ``loss``: a name of ``losses.LOSSES``. ``inputs``: what the student is trained
    on: the teacher's hidden states (the paper), the student's own, or half of each. ``max_seconds`` is shared out
    over units, ``tokens`` are for each of them."""

    loss: str = "mse"
    inputs: Literal["teacher", "student", "mixed"] = "mixed"


@dataclass(frozen=True)
class FinishSettings(TrainingSettings):
    """The finishing pass. ``which``: all parameters of the blocks in which something is dropped or pending, or
    their vectors only (norms, shifts, branch norms). ``recompute``: compute activations again in the backward pass
    instead of keeping those of all blocks."""

    which: Literal["blocks", "vectors"] = "blocks"
    recompute: bool = False
