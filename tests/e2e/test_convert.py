"""`megatron-spd convert`: every way between the formats gives the same bytes back, and says what it cannot do."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_spd.checkpoint.export import export
from megatron_spd.checkpoint.hf import CheckpointReader
from megatron_spd.grouping.permute import planned_weights
from megatron_spd.plan import SPDPlan
from tests.command_line import answer, command, files
from tests.e2e.bad_input import assert_one_line
from tests.families import make_model
from tests.megatron_files import OLD_NAMES, write_legacy
from tests.models import make_export, make_llama

BRANCHES = 2


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models in all formats: `hf`; `spd`, with heads and neurons moved; `trained`, one weight of it changed; `vectors`,
    with shifts; `legacy`; `plan.json` of `spd`; plans that ask for more."""
    root = tmp_path_factory.mktemp("world")
    hf = make_llama(root / "hf", layers=2, tied=False)
    reader = CheckpointReader(hf)
    plan = moving_plan(reader)
    plan.save(root / "plan.json")
    export(reader, plan, planned_weights(reader, plan), root / "spd")
    plan.with_block(0, mlp_shift=True).save(root / "shifts.json")
    plan.with_block(1, recovery="b2b").save(root / "b2b.json")
    other = dataclasses.replace(plan.base_model, fingerprint="0" * 64)
    dataclasses.replace(plan, base_model=other).save(root / "other.json")
    make_export(hf, root / "vectors", BRANCHES, [0], [(0, "mlp")])

    def trained(block: int) -> dict[str, torch.Tensor]:
        weights = dict(planned_weights(reader, plan)(block))
        weights["mlp.down_proj.weight"] = weights["mlp.down_proj.weight"] * 1.001
        return weights

    export(reader, plan.with_block(1, recovery="b2b"), trained, root / "trained")
    write_legacy(hf, root / "legacy", ranks=2, names=OLD_NAMES)
    assert command("convert", *way("hf", "megatron", hf, root / "megatron")).code == 0
    return root


def moving_plan(reader: CheckpointReader) -> SPDPlan:
    """Drops points, and moves heads of one block and neurons of both."""
    chance = random.Random(0)
    plan = SPDPlan.dense(reader.base_model(), BRANCHES).with_drops([0, 1])
    for block in range(2):
        neurons = chance.sample(range(reader.ffn), reader.ffn)
        plan = plan.with_block(block, tier="ISB", recovery="zs", neuron_order=neurons)
    groups = list(range(reader.kv_groups))
    return plan.with_block(0, kv_group_order=groups[::-1])


def way(before: str, after: str, source: Path, out: Path) -> list[object]:
    return ["--from", before, "--to", after, "--input", source, "--output", out]


def assert_same_model(given: Path, wanted: Path) -> None:
    """The same tensors to the byte, config and tokenizer."""
    held, expected = load_file(given / "model.safetensors"), load_file(wanted / "model.safetensors")
    assert held.keys() == expected.keys()
    for name, tensor in expected.items():
        assert held[name].dtype == tensor.dtype
        assert held[name].numpy().tobytes() == tensor.numpy().tobytes(), name
    config = [json.loads((folder / "config.json").read_text()) for folder in (given, wanted)]
    assert config[0] == config[1]
    names = [{name for name in files(folder) if name != "model.safetensors"} for folder in (given, wanted)]
    assert names[0] == names[1]


@pytest.mark.parametrize("kind", ["hf", "spd", "vectors"])
def test_to_megatron_and_back(world: Path, tmp_path: Path, kind: str) -> None:
    name = "hf" if kind == "hf" else "spd"
    result = answer("convert", *way(name, "megatron", world / kind, tmp_path / "megatron"))
    assert result["fingerprint"] == CheckpointReader(world / kind).fingerprint()
    assert result["branches"] == (None if kind == "hf" else BRANCHES)
    assert command("convert", *way("megatron", name, tmp_path / "megatron", tmp_path / "back")).code == 0
    assert_same_model(tmp_path / "back", world / kind)


@pytest.mark.parametrize("family", ["opt", "mixtral", "qwen3_moe"])
def test_every_way_of_other_families(tmp_path: Path, family: str) -> None:
    hf = make_model(family, tmp_path / "hf", num_hidden_layers=2)
    reader = CheckpointReader(hf)
    plan = moving_plan(reader)
    plan.save(tmp_path / "plan.json")
    export(reader, plan, planned_weights(reader, plan), tmp_path / "spd")
    done = [
        (("hf", "megatron"), "hf", "plain", []),
        (("megatron", "hf"), "plain", "hf again", []),
        (("megatron", "spd"), "plain", "spd of a plan", ["--plan", tmp_path / "plan.json"]),
        (("spd", "megatron"), "spd", "planned", []),
        (("megatron", "megatron"), "planned", "copied", []),
        (("megatron", "spd"), "copied", "spd again", []),
        (("megatron", "hf"), "copied", "hf of an spd", []),
    ]
    for (before, after), given, out, options in done:
        result = command("convert", *way(before, after, tmp_path / given, tmp_path / out), *options)
        assert result.code == 0, result.err
    for name in ("hf again", "hf of an spd"):
        assert_same_model(tmp_path / name, hf)
    for name in ("spd of a plan", "spd again"):
        assert_same_model(tmp_path / name, tmp_path / "spd")


def test_an_spd_model_that_was_not_trained_becomes_the_plain_one(world: Path, tmp_path: Path) -> None:
    result = answer("convert", *way("spd", "hf", world / "spd", tmp_path / "plain"))
    assert result["fingerprint"] == CheckpointReader(world / "hf").fingerprint()
    assert_same_model(tmp_path / "plain", world / "hf")


def test_a_plan_that_computes_nothing_is_applied(world: Path, tmp_path: Path) -> None:
    """From any format, into either: the export of the same plan."""
    plan = ["--plan", world / "plan.json"]
    assert command("convert", *way("hf", "spd", world / "hf", tmp_path / "spd"), *plan).code == 0
    assert_same_model(tmp_path / "spd", world / "spd")
    assert command("convert", *way("hf", "megatron", world / "hf", tmp_path / "megatron"), *plan).code == 0
    assert command("convert", *way("megatron", "spd", tmp_path / "megatron", tmp_path / "out")).code == 0
    assert_same_model(tmp_path / "out", world / "spd")
    assert command("convert", *way("megatron", "hf", tmp_path / "megatron", tmp_path / "plain")).code == 0
    assert_same_model(tmp_path / "plain", world / "hf")
    assert command("convert", *way("megatron", "spd", world / "megatron", tmp_path / "m"), *plan).code == 0
    assert_same_model(tmp_path / "m", world / "spd")


def test_files_of_ranks_become_a_folder_and_a_distributed_checkpoint(world: Path, tmp_path: Path) -> None:
    config = ["--hf-config", world / "hf"]
    assert command("convert", *way("megatron", "hf", world / "legacy", tmp_path / "hf"), *config).code == 0
    assert_same_model(tmp_path / "hf", world / "hf")
    again = way("megatron", "megatron", world / "legacy", tmp_path / "dist")
    assert command("convert", *again, *config).code == 0
    assert command("convert", *way("megatron", "hf", tmp_path / "dist", tmp_path / "back")).code == 0
    assert_same_model(tmp_path / "back", world / "hf")


def test_a_config_file_says_from_and_to(world: Path, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        f"from: spd\nto: hf\ninput: {world / 'spd'}\noutput: {tmp_path / 'out'}\n"
    )
    assert command("convert", "--config", tmp_path / "c.yaml").code == 0
    assert_same_model(tmp_path / "out", world / "hf")


# ---- what is refused ----------------------------------------------------------------------------------------------

Mistake = Callable[[Path, Path], list[object]]


def asked(before: str, after: str, name: str, *more: str) -> Mistake:
    """A conversion of what the world has under ``name``; ``more``: options, and names of files in the world."""
    return lambda world, out: [
        *way(before, after, world / name, out / "out"),
        *(m if m.startswith("--") else world / m for m in more),
    ]


def changed_weight(world: Path, out: Path) -> list[object]:
    """A distributed checkpoint whose weights are not those that were written there."""
    shutil.copytree(world / "megatron", out / "changed")
    source = make_llama(out / "another", layers=2, tied=False, seed=5)
    assert command("convert", *way("hf", "megatron", source, out / "donor")).code == 0
    for name in ("__0_0.distcp", ".metadata"):
        shutil.copyfile(out / "donor" / "release" / name, out / "changed" / "release" / name)
    return way("megatron", "hf", out / "changed", out / "out")


def truncated(world: Path, out: Path) -> list[object]:
    shutil.copytree(world / "megatron", out / "damaged")
    shard = out / "damaged" / "release" / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-100])
    return way("megatron", "hf", out / "damaged", out / "out")


def not_finite(world: Path, out: Path) -> list[object]:
    shutil.copytree(world / "hf", out / "damaged")
    held = load_file(out / "damaged" / "model.safetensors")
    held["model.layers.1.mlp.up_proj.weight"][3, 2] = float("inf")
    save_file(held, out / "damaged" / "model.safetensors", metadata={"format": "pt"})
    return way("hf", "megatron", out / "damaged", out / "out")


def occupied(world: Path, out: Path) -> list[object]:
    (out / "out").mkdir()
    (out / "out" / "thesis.txt").write_text("years of work")
    return way("hf", "megatron", world / "hf", out / "out")


REFUSED: dict[str, tuple[Mistake, str]] = {
    "unknown format": (asked("onnx", "hf", "hf"), "invalid choice: 'onnx'"),
    "no input": (asked("hf", "spd", "nothing"), "no model folder at"),
    "no Megatron input": (asked("megatron", "hf", "nothing"), "no folder"),
    "a folder called a checkpoint": (asked("megatron", "hf", "hf"), "is no Megatron checkpoint"),
    "a checkpoint called a folder": (asked("hf", "megatron", "megatron"), "has no config.json"),
    "an export called plain": (asked("hf", "megatron", "spd"), "is an SPD export; give --from spd"),
    "a plain model called an export": (asked("spd", "hf", "hf"), "is a plain model; give --from hf"),
    "no plan": (asked("hf", "spd", "hf"), "needs the plan to apply: give it as --plan"),
    "a plan for nothing": (asked("hf", "hf", "hf", "--plan", "plan.json"), "leave it out here"),
    "two plans": (asked("spd", "megatron", "spd", "--plan", "plan.json"), "leave it out here"),
    "plan of another model": (asked("hf", "spd", "hf", "--plan", "other.json"), "the plan was made for"),
    "plan with shifts": (
        asked("hf", "spd", "hf", "--plan", "shifts.json"),
        "asks for shifts, branch norms or re-fits in block 0",
    ),
    "plan with training": (
        asked("hf", "megatron", "hf", "--plan", "b2b.json"),
        "asks for distillation in block 1",
    ),
    "trained": (asked("spd", "hf", "trained"), "changed by training or re-fits (by its plan in block 1)"),
    "calibrated": (asked("spd", "hf", "vectors"), "calibration gave block 0 shifts or branch norms"),
    "no config": (asked("megatron", "hf", "legacy"), "as --hf-config"),
    "a config too many": (
        asked("hf", "megatron", "hf", "--hf-config", "hf"),
        "--hf-config is for --from megatron",
    ),
    "other weights": (changed_weight, "does not hold the weights that were written there"),
    "truncated": (truncated, "is truncated"),
    "not finite": (not_finite, "NaN or infinite"),
    "occupied": (occupied, "already holds something else"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_converted_is_said(world: Path, tmp_path: Path, case: str) -> None:
    mistake, words = REFUSED[case]
    given = mistake(world, tmp_path)
    before = files(tmp_path)
    assert_one_line(command("convert", *given), words)
    assert files(tmp_path) == before
