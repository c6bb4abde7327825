"""Training steps of a whole model in every parallel form against plain PyTorch on one process: losses and weights."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_spd.calibration.stream import model_shape
from megatron_spd.checkpoint.hf import CheckpointReader
from megatron_spd.finetune.export import export_trained
from megatron_spd.finetune.loss import NextTokenLoss
from megatron_spd.finetune.megatron import MegatronTrainer
from megatron_spd.models.build import build_gpt_model
from megatron_spd.plan import SPDPlan
from megatron_spd.runtime.distributed import Runtime, initialize
from tests.families import make_model
from tests.models import make_export, make_llama
from tests.ranks import run_ranks

#: Seconds: ranks that start on a busy machine take a while.
LIMIT = 200
STEPS, BATCH, S = 2, 4, 16
#: With a large epsilon the rounding of a small gradient does not decide which way Adam goes.
RATE, EPS, DECAY = 0.05, 0.1, 0.01
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
#: Attention and MLP points, runs over blocks, the MLP points of blocks 0 and 1 among them.
DROPPED = (0, 1, 2, 3, 6)


@dataclasses.dataclass(frozen=True)
class Form:
    """How four ranks share a model of four blocks; ``ends``: the last blocks of all pipeline stages but the last."""

    tensor: int = 2
    pipeline: int = 1
    distributed_optimizer: bool = False
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    ends: tuple[int, ...] = ()


def tokens() -> Tensor:
    """[steps, sequences, s + 1]."""
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 320, (STEPS, BATCH, S + 1), generator=generator)


def load(
    folder: Path, runtime: Runtime, plan: SPDPlan, **overrides: Any
) -> tuple[CheckpointReader, GPTModel]:
    reader = CheckpointReader(folder)
    shape = model_shape(reader)
    return reader, build_gpt_model(shape, plan, reader.block, reader.get, runtime, torch.float32, **overrides)


def plan_of(folder: Path) -> SPDPlan:
    plan = CheckpointReader(folder).plan
    assert plan is not None
    return plan


def train_form(folder: Path, out: Path, form: Form) -> list[float]:
    """Trains on four ranks by Megatron-core, exports to ``out``; the losses."""
    runtime = initialize(form.tensor, pipeline_parallel=form.pipeline)
    plan = plan_of(folder)
    reader, model = load(folder, runtime, plan, **form.overrides)
    trainer = MegatronTrainer(
        model,
        runtime,
        reader.config["vocab_size"],
        RATE,
        DECAY,
        form.distributed_optimizer,
        adam_eps=EPS,
        clip_grad=0.0,
    )
    mine = BATCH // runtime.dp_size
    rows = slice(runtime.dp_rank * mine, (runtime.dp_rank + 1) * mine)
    losses = [trainer.step(step[rows]) for step in tokens()]
    export_trained(reader, plan, model, runtime, out, steps=STEPS)
    return losses


def train_alone(folder: Path, out: Path, ends: tuple[int, ...]) -> list[float]:
    """The same by PyTorch's optimizer on one process, under the plan that stages with these ``ends`` compute."""
    runtime = initialize(1)
    plan = plan_of(folder).synced_behind(ends)
    reader, model = load(folder, runtime, plan)
    loss_of = NextTokenLoss(model, runtime, reader.config["vocab_size"])
    vectors = [p for p in model.parameters() if p.dim() == 1]
    matrices = [p for p in model.parameters() if p.dim() > 1]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.999), eps=EPS)
    losses = []
    for step in tokens():
        optimizer.zero_grad()
        loss = loss_of(step)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    export_trained(reader, plan, model, runtime, out, steps=STEPS)
    return losses


def weights(folder: Path) -> dict[str, Tensor]:
    reader = CheckpointReader(folder)
    return {name: reader.get(name).double() for name in reader.names()}


FORMS = {
    "tp2 pp2": Form(pipeline=2, ends=(1,)),
    "tp2 pp2, one block and three, recompute": Form(
        pipeline=2, ends=(0,), overrides=RECOMPUTE | {"num_layers_in_first_pipeline_stage": 1}
    ),
    "tp2 pp2, laid out by hand": Form(
        pipeline=2, ends=(2,), overrides={"pipeline_model_parallel_layout": "Ettt|tL"}
    ),
    "pp4": Form(tensor=1, pipeline=4, ends=(0, 1, 2)),
    "tp2 dp2": Form(overrides=RECOMPUTE),
    "tp2 dp2, distributed optimizer": Form(distributed_optimizer=True),
    "tp2 dp2, sequence parallel": Form(overrides={"sequence_parallel": True}),
    "tp4, sequence parallel, recompute": Form(tensor=4, overrides=RECOMPUTE | {"sequence_parallel": True}),
    "tp2 pp2, sequence parallel, recompute": Form(
        pipeline=2, ends=(1,), overrides=RECOMPUTE | {"sequence_parallel": True}
    ),
    "dp4, distributed optimizer": Form(tensor=1, distributed_optimizer=True),
}


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied with biases"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    # A vocabulary that does not divide by the ranks.
    base = make_llama(
        folder / "m", layers=4, heads=8, kv=4, tied=request.param, biases=not request.param, vocabulary=327
    )
    shifts, norms = [(1, "attention"), (3, "mlp")], [(0, "mlp"), (2, "attention")]
    return make_export(base, folder / "spd", 4, DROPPED, shifts, norms=norms)


@pytest.fixture(scope="module")
def alone(model: Path) -> Callable[[tuple[int, ...]], tuple[list[float], Path]]:
    """Losses and export of one process by the ends of stages."""

    @functools.cache
    def trained(ends: tuple[int, ...]) -> tuple[list[float], Path]:
        out = model.parent / f"alone{len(ends)}{sum(ends)}"
        return run_ranks(1, train_alone, model, out, ends, timeout=LIMIT)[0], out

    return trained


@pytest.mark.filterwarnings("ignore:the plan drops sync point")
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_steps_are_those_of_one_process(
    model: Path, alone: Callable[..., tuple[list[float], Path]], tmp_path: Path, form: Form
) -> None:
    assert_trained_alike(model, *alone(form.ends), tmp_path / "form", form)


@pytest.mark.parametrize("form", ["tp2 dp2", "tp4, sequence parallel, recompute"])
def test_norms_of_heads_are_trained_as_on_one_process(tmp_path: Path, form: str) -> None:
    """Megatron-core's training loop knows norms of queries and keys by their names."""
    base = make_model("qwen3", tmp_path / "m", num_hidden_layers=4, layer_types=["full_attention"] * 4)
    model = make_export(base, tmp_path / "spd", 4, DROPPED)
    losses = run_ranks(1, train_alone, model, tmp_path / "alone", (), timeout=LIMIT)[0]
    assert_trained_alike(model, losses, tmp_path / "alone", tmp_path / "form", FORMS[form])


def assert_trained_alike(
    model: Path, wanted_losses: list[float], wanted_folder: Path, out: Path, form: Form
) -> None:
    """Training ``model`` on four ranks gives the losses and weights of one process."""
    for losses in run_ranks(4, train_form, model, out, form, timeout=LIMIT):
        assert losses == pytest.approx(wanted_losses, rel=1e-5)
    before, wanted, got = (weights(f) for f in (model, wanted_folder, out))
    assert set(got) == set(wanted) == set(before)
    for name, tensor in wanted.items():
        moved = (tensor - before[name]).norm()
        assert moved > 1e-3 * tensor.norm(), f"{name} has not been trained"
        assert (got[name] - tensor).norm() < 1e-5 * tensor.norm(), name
    plan = plan_of(out)
    assert plan.dropped == [p for p in DROPPED if p % 2 == 0 or p // 2 not in form.ends]
    assert plan.provenance["finetune"] == {"steps": STEPS}
