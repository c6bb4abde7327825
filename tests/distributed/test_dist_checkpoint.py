"""Megatron-core's own saving and loading of distributed checkpoints against ours, at several tensor-parallel sizes."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.models.gpt import GPTModel

from megatron_spd.calibration.stream import model_shape
from megatron_spd.checkpoint.dist import DistStore
from megatron_spd.checkpoint.dist_model import load_model, save_model, write_megatron
from megatron_spd.checkpoint.hf import CheckpointReader
from megatron_spd.checkpoint.megatron import MegatronReader
from megatron_spd.checkpoint.view import view_of
from megatron_spd.models.build import build_gpt_model
from megatron_spd.plan import SPDPlan
from megatron_spd.runtime.distributed import Runtime, initialize
from megatron_spd.stages import final_weights
from tests.families import make_model
from tests.models import make_export, make_llama
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A plain and an SPD model, as Hugging Face folders and converted. The vocabulary does not divide by 2 or 3."""
    root = tmp_path_factory.mktemp("models")
    plain = make_llama(
        root / "hf", hidden=48, heads=12, kv=6, ffn=48, biases=True, tied=False, vocabulary=331
    )
    spd = make_export(plain, root / "spd", 6, [0, 2, 3], [(1, "mlp")], norms=[(1, "attention")])
    for folder in plain, spd:
        write_megatron(view_of(CheckpointReader(folder)), initialize(), root / f"{folder.name}.megatron")
    return {p.name: p for p in root.iterdir()}


def build(folder: Path, ranks: int) -> tuple[GPTModel, SPDPlan, Runtime]:
    runtime, reader = initialize(ranks), CheckpointReader(folder)
    plan = reader.plan or SPDPlan.dense(reader.base_model(), ranks)
    weights = final_weights(reader, plan)
    model = build_gpt_model(model_shape(reader), plan, weights, reader.get, runtime, torch.float32)
    return model, plan, runtime


def load_case(folder: Path, checkpoint: Path, ranks: int) -> list[str]:
    """Parameters that differ, after loading, from those of the model built of the Hugging Face folder."""
    model, plan, runtime = build(folder, ranks)
    wanted = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    load_model(model, plan, runtime, checkpoint)
    vocabulary = CheckpointReader(folder).config["vocab_size"]
    rows = len(model.embedding.word_embeddings.weight)
    used = slice(0, max(0, min(rows, vocabulary - runtime.tp_rank * rows)))
    tables = ("embedding.word_embeddings.weight", "output_layer.weight")
    parts = {name: used if name in tables else slice(None) for name in wanted}
    return [n for n, p in model.named_parameters() if not torch.equal(p[parts[n]], wanted[n][parts[n]])]


@pytest.mark.parametrize("kind", ["hf", "spd"])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_megatron_core_loads_what_was_converted(folders: dict[str, Path], kind: str, ranks: int) -> None:
    answers = run_ranks(ranks, load_case, folders[kind], folders[f"{kind}.megatron"], ranks)
    assert answers == [[]] * ranks


def save_case(folder: Path, out: Path, ranks: int) -> None:
    # Megatron-core writes in processes of its own, which a rank of the pool may not start.
    multiprocessing.current_process()._config["daemon"] = False
    model, _, runtime = build(folder, ranks)
    save_model(model, view_of(CheckpointReader(folder)), runtime, out)


def test_a_live_model_is_saved(folders: dict[str, Path], tmp_path: Path) -> None:
    run_ranks(3, save_case, folders["spd"], tmp_path / "saved", 3)
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]
    assert MegatronReader(tmp_path / "saved").fingerprint() == CheckpointReader(folders["spd"]).fingerprint()
    assert run_ranks(2, load_case, folders["spd"], tmp_path / "saved", 2) == [[], []]


def save_as_megatron(folder: Path, out: Path, ranks: int, singletons: bool = False) -> None:
    """As a script of Megatron-core saves by default: layers stacked; ``singletons``: nothing is. With experts, norms
    in front of them by the name that Transformer Engine's layer spec gives them."""
    multiprocessing.current_process()._config["daemon"] = False
    model, _, runtime = build(folder, ranks)
    if runtime.is_main:
        out.mkdir()
    runtime.barrier()
    state = model.sharded_state_dict(metadata={"singleton_local_shards": True} if singletons else None)
    if model.config.num_moe_experts is not None:
        for item in state.values():
            item.key = item.key.replace("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.")
    dist_checkpointing.save(state, str(out))


def test_a_checkpoint_of_megatron_core_is_read(folders: dict[str, Path], tmp_path: Path) -> None:
    run_ranks(2, save_as_megatron, folders["hf"], tmp_path / "saved", 2)
    read = MegatronReader(tmp_path / "saved", folders["hf"])
    assert DistStore(tmp_path / "saved").stacked
    assert read.fingerprint() == CheckpointReader(folders["hf"]).fingerprint()
    assert run_ranks(3, load_case, folders["hf"], tmp_path / "saved", 3) == [[]] * 3


@pytest.mark.parametrize("family", ["opt", "mixtral", "qwen3_moe"])
@pytest.mark.parametrize("kind", ["hf", "spd"])
def test_positions_and_experts_of_a_live_model(tmp_path: Path, family: str, kind: str) -> None:
    """What Megatron-core does not keep as one tensor for one parameter: converted, loaded, saved and read again."""
    folder = make_model(family, tmp_path / "hf")
    if kind == "spd":
        folder = make_export(folder, tmp_path / "spd", 4, [0, 2, 3], [(1, "mlp")], norms=[(1, "attention")])
    write_megatron(view_of(CheckpointReader(folder)), initialize(), tmp_path / "converted")
    assert run_ranks(2, load_case, folder, tmp_path / "converted", 2) == [[]] * 2
    run_ranks(4, save_case, folder, tmp_path / "saved", 4)
    assert MegatronReader(tmp_path / "saved").fingerprint() == CheckpointReader(folder).fingerprint()
    assert run_ranks(2, load_case, folder, tmp_path / "saved", 2) == [[]] * 2


@pytest.mark.parametrize("family", ["opt", "mixtral"])
@pytest.mark.parametrize("singletons", [False, True])
def test_layouts_of_megatron_core(tmp_path: Path, family: str, singletons: bool) -> None:
    """Experts are stacked behind the axis of layers, or numbered; a norm has the name that Transformer Engine's spec
    gives it. The rows of positions that no model of Megatron-core holds come from the folder of the config."""
    folder = make_model(family, tmp_path / "hf")
    run_ranks(2, save_as_megatron, folder, tmp_path / "saved", 2, singletons)
    read = MegatronReader(tmp_path / "saved", folder)
    assert read.fingerprint() == CheckpointReader(folder).fingerprint()
    assert run_ranks(1, load_case, folder, tmp_path / "saved", 1) == [[]]
