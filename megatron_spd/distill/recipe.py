"""Block-to-block distillation (SPD paper, section 4.2) inside DeepSpeed.

Teacher: the tensor-parallel blocks with every sync point kept. Student: the same blocks under the plan,
initialised from the teacher's (permuted) weights. Both see the teacher's hidden states; the student learns
the teacher's output. The unit is a run of blocks joined by dropped MLP points, a single block in the paper's
case.

Units are independent and are kept as files: a killed run starts again at its first unfinished unit, whose
random order of sequences depends on nothing but the seed, and so ends with the same weights.
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_spd.calibration.stream import BlockStreamer, BlockWeights
from megatron_spd.comm.all_reduce import all_reduce
from megatron_spd.distill.engine import EngineSettings, deepspeed_config, make_engine
from megatron_spd.distill.losses import LOSSES
from megatron_spd.distill.tracking import Tracker
from megatron_spd.distill.units import UnitStore, plan_mark
from megatron_spd.errors import UserError
from megatron_spd.models.build import DTYPES, BlockUnit
from megatron_spd.models.weights import unshard_block
from megatron_spd.plan import SPDPlan
from megatron_spd.progress import progress_bar
from megatron_spd.runtime.distributed import Runtime, tensor_parallel_seed


@dataclass(frozen=True)
class DistillSettings:
    """``engine``: what DeepSpeed gets; ``epochs`` over the training sequences; ``loss``: a name of ``losses.LOSSES``;
    ``held_out``: share of the sequences that judge (at least one); ``max_seconds``: stop training after that,
    shared out over units."""

    engine: EngineSettings
    epochs: int
    loss: str = "mse"
    held_out: float = 0.125
    seed: int = 1234
    max_seconds: float | None = None

    def identity(self, plan: SPDPlan, tokens: Tensor) -> str:
        """A hash of everything that decides the resulting weights, behind the plan's own mark (``units.plan_mark``)."""
        plan_part = {k: v for k, v in plan.to_dict().items() if k != "provenance"}
        settings = dataclasses.asdict(self)
        # A time budget decides when training stops, not what is trained; a continued run may have another.
        settings.pop("max_seconds")
        settings["config_file"] = deepspeed_config(self.engine, 1)
        text = json.dumps([plan_part, settings], sort_keys=True).encode()
        return f"{plan_mark(plan)} {hashlib.sha256(text + tokens.numpy().tobytes()).hexdigest()}"

    def check_amount(self, sequences: int, replicas: int = 1) -> None:
        """Raise UserError unless ``sequences`` are enough to hold some out and to make one optimizer step of the
        rest on each of ``replicas`` data-parallel replicas, or if the DeepSpeed config is not usable."""
        micro_batch, accumulation = self.batching()
        if sequences < 2:
            raise UserError(
                f"distillation was given {sequences} sequence(s); it needs at least 2 (one is held out)"
            )
        training = sequences - self.held_out_count(sequences)
        each = training * self.epochs // replicas
        if each < micro_batch * accumulation:
            raise UserError(
                f"{training} training sequences x {self.epochs} epochs give {each} to each replica, less "
                f"than one step of {micro_batch} x {accumulation}; use more sequences or a smaller batch"
            )

    def batching(self) -> tuple[int, int]:
        """Micro-batch size and gradient accumulation as DeepSpeed will have them."""
        config = deepspeed_config(self.engine, 1)
        return config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]

    def held_out_count(self, sequences: int) -> int:
        """How many of ``sequences`` judge; the last ones do."""
        return max(1, round(sequences * self.held_out))


def units_to_train(plan: SPDPlan) -> list[range]:
    """The plan's units in which some block's recovery asks for distillation."""
    return [u for u in plan.units() if any(plan.blocks[i].recovery.endswith("b2b") for i in u)]


def distill(
    streamer: BlockStreamer,
    plan: SPDPlan,
    tokens: Tensor,
    settings: DistillSettings,
    store: UnitStore,
    tracker: Tracker,
) -> list[dict[str, Any]]:
    """Train every unit that asks for it and leave its weights in ``store``; returns one record per unit.

    ``streamer`` walks the base weights in the plan's order; ``tokens`` [n, s]. The records hold ``blocks``,
    ``loss_before`` and ``loss_after`` on the held-out sequences, ``losses`` of the steps, and ``kept`` (False
    where training did not help and the initial weights stay).
    """
    units = units_to_train(plan)
    if settings.loss not in LOSSES:
        raise UserError(f"loss {settings.loss!r} is not known; choose one of {sorted(LOSSES)}")
    if units:
        settings.check_amount(len(tokens), streamer.runtime.dp_size)
    # The main rank decides: others may see a shared disk late.
    missing = streamer.runtime.from_main([u for u in units if not store.has(u)])
    clock = _Clock(settings.max_seconds, len(missing))
    x = streamer.embed(tokens) if missing else []
    block = 0
    for unit in missing:
        while block < unit.start:
            x = streamer.advance(block, x)
            block += 1
        inputs = x
        while block < unit.stop:
            x = streamer.advance(block, x)
            block += 1
        trainer = _UnitTrainer(streamer, plan, unit, settings, tracker)
        record = trainer.run(torch.cat(list(inputs), 1), torch.cat(list(x), 1), clock.share())
        store.save(unit, trainer.full_weights() if record["kept"] else None, record, streamer.runtime)
        trainer.close()
    streamer.runtime.barrier()
    return [store.record(u) for u in units]


class _Clock:
    """Shares a time budget out over the units that are left."""

    def __init__(self, seconds: float | None, units: int) -> None:
        self._end = None if seconds is None else time.monotonic() + seconds
        self._left = units

    def share(self) -> float | None:
        if self._end is None:
            return None
        seconds = max(0.0, self._end - time.monotonic()) / max(1, self._left)
        self._left -= 1
        return seconds


class _UnitTrainer:
    """One unit: its student, its DeepSpeed engine, its loop."""

    def __init__(
        self,
        streamer: BlockStreamer,
        plan: SPDPlan,
        unit: range,
        settings: DistillSettings,
        tracker: Tracker,
    ) -> None:
        self.runtime: Runtime = streamer.runtime
        self.unit, self.settings, self.tracker = unit, settings, tracker
        self.loss = LOSSES[settings.loss]
        self.dtype = DTYPES[settings.engine.dtype]
        schedules = [plan.block_schedule(i) for i in unit]
        self.student = BlockUnit(streamer.shape, schedules, self.runtime, self.dtype)
        self.names = self._load(streamer.weights)
        self.micro_batch, self.accumulation = settings.batching()
        self.engine: Any = None

    def _load(self, weights: BlockWeights) -> list[list[str]]:
        names = []
        for index, block in enumerate(self.unit):
            given = weights(block)
            self.student.load_block(index, given)
            names.append(list(given))
        return names

    def run(self, inputs: Tensor, targets: Tensor, seconds: float | None) -> dict[str, Any]:
        """Train on ``inputs`` -> ``targets``, both [s, n, h]; ``seconds``: stop then, if given."""
        n = inputs.shape[1]
        first_judge = n - self.settings.held_out_count(n)
        train, judge = slice(0, first_judge), slice(first_judge, n)
        before = self._held_out_loss(inputs[:, judge], targets[:, judge])
        if not (bool(torch.isfinite(targets).all()) and math.isfinite(before)):
            raise UserError(
                f"the hidden states behind {_name(self.unit)} are not finite on this text: the model's activations "
                "overflow or hold NaN; check the checkpoint, or use --dtype fp32"
            )
        losses = self._train(inputs[:, train], targets[:, train], seconds)
        after = self._held_out_loss(inputs[:, judge], targets[:, judge])
        return {
            "blocks": list(self.unit),
            "loss_before": before,
            "loss_after": after,
            "kept": bool(losses) and after < before,
            "losses": losses,
        }

    def _train(self, inputs: Tensor, targets: Tensor, seconds: float | None) -> list[float]:
        """The loss of every optimizer step, averaged over its micro-batches and the replicas."""
        batches = self._micro_batches(inputs.shape[1])
        steps = len(batches) // self.accumulation
        self.student.train()
        self.engine = make_engine(self.student, deepspeed_config(self.settings.engine, steps))
        tensor_parallel_seed(self.settings.seed + self.unit.start)
        losses: list[float] = []
        started = time.monotonic()
        with progress_bar(self.runtime, f"distil {_name(self.unit)}", steps, "step") as bar:
            for step in range(steps):
                part = batches[step * self.accumulation : (step + 1) * self.accumulation]
                losses.append(self._step(inputs, targets, part))
                self.tracker.unit_loss(self.unit.start, step + 1, losses[-1], self.engine.get_lr()[0])
                bar.update()
                bar.set_postfix_str(f"loss {losses[-1]:.4g}")
                if seconds is not None and self.runtime.from_main(time.monotonic() - started > seconds):
                    break
        return losses

    def _step(self, inputs: Tensor, targets: Tensor, batches: list[Tensor]) -> float:
        total = torch.zeros((), device=self.runtime.device)
        for batch in batches:
            x, target = (t[:, batch].to(self.dtype) for t in (inputs, targets))
            loss = self.loss(self.engine(x), target)
            self.engine.backward(loss)
            self.engine.step()
            total += loss.detach()
        return float(all_reduce(total, self.runtime.dp_group)) / (len(batches) * self.runtime.dp_size)

    def _micro_batches(self, sequences: int) -> list[Tensor]:
        """This replica's micro-batches of all epochs, as sequence numbers; the same on all ranks of a replica."""
        seed = self.settings.seed * 1_000_003 + self.unit.start
        generator = torch.Generator().manual_seed(seed)
        order = torch.cat(
            [torch.randperm(sequences, generator=generator) for _ in range(self.settings.epochs)]
        )
        least = len(order) // self.runtime.dp_size
        share = order[self.runtime.dp_rank :: self.runtime.dp_size][:least]
        return [b for b in share.split(self.micro_batch) if len(b) == self.micro_batch]

    @torch.no_grad()
    def _held_out_loss(self, inputs: Tensor, targets: Tensor) -> float:
        self.student.eval()
        size = self.micro_batch
        total = 0.0
        for x, target in zip(inputs.split(size, 1), targets.split(size, 1), strict=True):
            x, target = x.to(self.dtype).contiguous(), target.to(self.dtype)
            total += float(self.loss(self.student(x), target)) * x.shape[1]
        return total / inputs.shape[1]

    def full_weights(self) -> dict[int, dict[str, Tensor]]:
        """The student's blocks as full Hugging Face tensors on the main rank (empty elsewhere): a collective
        of the replica."""
        return {
            block: _gather(
                self.student.hf_shard(index, self.names[index]), self.runtime, self.student.shape.family
            )
            for index, block in enumerate(self.unit)
        }

    def close(self) -> None:
        """Free the engine's memory before the next unit is built."""
        if self.engine is not None:
            self.engine.destroy()
        self.engine = None
        self.student = None  # type: ignore[assignment]
        gc.collect()


def _name(unit: range) -> str:
    return f"block {unit.start}" if len(unit) == 1 else f"blocks {unit.start}..{unit.stop - 1}"


def _gather(shard: Mapping[str, Tensor], runtime: Runtime, family: Any) -> dict[str, Tensor]:
    """Full tensors on the first rank of a replica from the shards of its ranks, one tensor at a time."""
    full: dict[str, Tensor] = {}
    for name, tensor in shard.items():
        tensor = tensor.contiguous()
        if runtime.tp_size == 1 or family.tensor(name).dim is None:
            parts = [tensor]
        else:
            first = dist.get_global_rank(runtime.tp_group, 0)
            parts = [torch.empty_like(tensor) for _ in range(runtime.tp_size)] if runtime.tp_rank == 0 else []
            dist.gather(tensor, parts or None, dst=first, group=runtime.tp_group)
        if runtime.tp_rank == 0:
            full |= unshard_block([{name: p.cpu()} for p in parts], family)
    return full
