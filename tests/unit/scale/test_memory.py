"""The dry run's bytes against what the stages allocate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_spd.checkpoint.hf import CheckpointReader
from megatron_spd.compensation import calibrate_into, chosen_ingredients, measured_variants
from megatron_spd.config import DryRunOptions
from megatron_spd.distill.finish import finish
from megatron_spd.distill.recipe import distill
from megatron_spd.distill.tracking import Tracker
from megatron_spd.distill.units import FinishStore, UnitStore
from megatron_spd.parsing import parse_options
from megatron_spd.plan import SPDPlan
from megatron_spd.runtime.distributed import initialize
from megatron_spd.scale.memory import stage_memory
from megatron_spd.scale.setup import Setup
from megatron_spd.sensitivity.sweep import sweep
from megatron_spd.stages import distill_settings, final_weights, finish_settings, make_streamer, write_export
from tests.allocations import peak_bytes
from tests.models import make_llama, tiny_text
from tests.ranks import run_ranks

#: Relative: prediction and measurement must be this close.
TOLERANCE = 0.2

COMMON = [
    "--dry-run",
    "--hardware",
    "cpu",
    "--branches",
    "2",
    "--seq-length",
    "128",
    "--micro-batch-size",
    "2",
    "--epochs",
    "1",
]
CASES = {
    "sensitivity": ["--recovery", "zs", "--sequences", "16"],
    "sensitivity, grouped": [
        "--recovery",
        "grouped",
        "--sequences",
        "16",
        "--calibration-sequences",
        "8",
        "--sync-points",
        "attention",
    ],
    "calibration": ["--recovery", "grouped", "--calibration-sequences", "8"],
    "distillation": ["--recovery", "paper", "--distill-sequences", "32", "--sync-points", "attention"],
    "distillation, zero 1": ["--recovery", "paper", "--distill-sequences", "8", "--zero-stage", "1"],
    "finishing": ["--recovery", "full", "--distill-sequences", "8"],
    "export": ["--recovery", "zs"],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("m")
    (folder / "text").write_text(tiny_text(3000))
    sizes: dict[str, Any] = {"hidden": 256, "heads": 8, "kv": 4, "layers": 4, "ffn": 768}
    return make_llama(folder / "m", **sizes, tied=False, dtype=torch.bfloat16)


def options_of(model: Path, case: str) -> DryRunOptions:
    given = [*COMMON, *CASES[case], "--config", str(model), "--data", str(model.parent / "text")]
    return parse_options(DryRunOptions, given, "test")


def measured(model: Path, case: str, out: Path) -> int:
    """Peak bytes of a stage of a real run."""
    options, runtime = options_of(model, case), initialize(1)
    reader = CheckpointReader(model)
    which = options.sync_points
    # In front of the unit something is dropped too, so that the student has a stream of its own.
    plan = SPDPlan.dense(reader.base_model(), 2).with_drops([0, 2] if which == "attention" else [0, 2, 3])
    for block in plan.units()[-1]:
        plan = plan.with_block(block, recovery="b2b")
    tracker = Tracker("none", out)
    generator = torch.Generator().manual_seed(0)

    def tokens(pieces: int) -> torch.Tensor:
        return torch.randint(3, 300, (pieces, options.seq_length), generator=generator)

    def sensitivity() -> None:
        streamer = make_streamer(reader, runtime)
        variants, _ = measured_variants(streamer, 2, options, options.grouped)
        method = "algorithm1" if which == "attention" else "single"
        sweep(streamer, tokens(options.sequences), 2, method, which, variants=variants)

    def calibration() -> None:
        streamer, ingredients = make_streamer(reader, runtime), chosen_ingredients(options)
        calibrate_into(streamer, plan, tokens(options.calibration_sequences), ingredients, out / "c")

    def distillation() -> None:
        settings, text = distill_settings(options, None), tokens(options.distill_sequences)
        store = UnitStore(out / "u", "", runtime)
        streamer = make_streamer(reader, runtime, micro_batch=options.micro_batch_size)
        distill(streamer, plan, text, settings, store, tracker, final_weights(reader, plan))

    def finishing() -> None:
        settings, text = finish_settings(options, None), tokens(options.distill_sequences)
        assert settings is not None
        every = SPDPlan.dense(reader.base_model(), 2).with_drops([0, 2, 4, 6])
        streamer = make_streamer(reader, runtime, micro_batch=options.micro_batch_size)
        weights = final_weights(reader, every)
        finish(streamer, every, text, settings, FinishStore(out / "f", "", runtime), tracker, weights)

    def export() -> None:
        nonlocal plan
        plan = plan.with_block(1, kv_group_order=[1, 0, 3, 2], neuron_order=[*range(1, 768), 0])
        write_export(reader, runtime, plan, final_weights(reader, plan), out / "e")

    return peak_bytes(locals()[case.split(",")[0]])


@pytest.mark.timeout(240)
@pytest.mark.parametrize("case", CASES)
def test_predicted_bytes_are_what_a_stage_allocates(model: Path, tmp_path: Path, case: str) -> None:
    parts = stage_memory(Setup.of(options_of(model, case)))[case.split(",")[0]]
    predicted = sum(part.bytes for part in parts)
    got = run_ranks(1, measured, model, case, tmp_path, timeout=200)[0]
    assert predicted == pytest.approx(got, rel=TOLERANCE), parts
