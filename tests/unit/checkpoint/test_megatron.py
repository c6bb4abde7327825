"""Megatron checkpoints read and written: bytes unchanged, any layout that Megatron-LM writes, damage refused."""

from __future__ import annotations

import argparse
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from megatron_spd.calibration.stream import model_shape
from megatron_spd.checkpoint.dist import DistStore, write_dist
from megatron_spd.checkpoint.dist_model import load_model, write_megatron
from megatron_spd.checkpoint.hf import CheckpointReader
from megatron_spd.checkpoint.megatron import MegatronReader
from megatron_spd.checkpoint.view import view_of
from megatron_spd.errors import CheckpointError, PlanError, UserError
from megatron_spd.models.build import build_gpt_model
from megatron_spd.runtime.distributed import initialize, shutdown
from megatron_spd.stages import final_weights
from tests.families import make_model
from tests.megatron_files import assert_same, write_legacy
from tests.models import make_export, make_llama


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(
        tmp_path_factory.mktemp("base") / "m", heads=12, kv=6, head_dim=4, hidden=48, tied=False
    )


@pytest.fixture(scope="module")
def spd(base: Path) -> Path:
    return make_export(base, base.parent / "spd", 6, [0, 2, 3], [(1, "mlp")], norms=[(1, "attention")])


@pytest.fixture(scope="module")
def written(spd: Path) -> Path:
    """The SPD model as a torch_dist checkpoint."""
    write_megatron(view_of(CheckpointReader(spd)), initialize(), spd.parent / "megatron")
    return spd.parent / "megatron"


# ---- torch_dist ---------------------------------------------------------------------------------------------------

VARIANTS: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied, biases": {"tied": False, "biases": True},
    "bf16": {"dtype": torch.bfloat16},
    "shards": {"max_shard_size": "20KB"},
    "one head for each group": {"hidden": 48, "heads": 6, "kv": 6, "head_dim": 16},
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_a_model_is_the_same_after_the_way_there_and_back(tmp_path: Path, variant: dict[str, Any]) -> None:
    reader = CheckpointReader(make_llama(tmp_path / "m", **variant))
    written = write_megatron(view_of(reader), initialize(), tmp_path / "out")
    read = MegatronReader(tmp_path / "out")
    assert_same(read, reader)
    assert written == read.recorded_fingerprint == reader.fingerprint()
    assert read.tokenizer()("a text").input_ids == reader.tokenizer()("a text").input_ids


#: A case of every family, and of what can be left out of one.
FAMILIES = ["mistral", "qwen2", "qwen3 with biases", "opt", "opt without biases", "mixtral", "qwen3_moe"]


@pytest.fixture(scope="module")
def family_models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """The plain ("hf") or SPD model of a case of :data:`tests.families.CONFIGS`; "megatron": the latter converted."""
    root = tmp_path_factory.mktemp("families")

    def model(case: str, kind: str) -> Path:
        folder = root / case / kind
        if folder.exists():
            return folder
        if kind == "hf":
            return make_model(case, folder)
        if kind == "spd":
            vectors = {"shifts": [(1, "mlp")], "norms": [(1, "attention")]}
            return make_export(model(case, "hf"), folder, 4, [0, 2, 3], **vectors)
        write_megatron(view_of(CheckpointReader(model(case, "spd"))), initialize(), folder)
        return folder

    return model


@pytest.mark.parametrize("case", FAMILIES)
def test_every_family_is_the_same_after_the_way_there_and_back(
    family_models: Callable, tmp_path: Path, case: str
) -> None:
    plain, spd = (CheckpointReader(family_models(case, kind)) for kind in ("hf", "spd"))
    write_megatron(view_of(plain), initialize(), tmp_path / "out")
    assert_same(MegatronReader(tmp_path / "out"), plain)
    read = MegatronReader(family_models(case, "megatron"))
    assert_same(read, spd)
    assert read.plan == spd.plan


def test_an_spd_model_keeps_its_plan_and_its_vectors(spd: Path, written: Path) -> None:
    assert_same(MegatronReader(written), CheckpointReader(spd))
    assert MegatronReader(written).plan == CheckpointReader(spd).plan


def test_only_attention_biases(tmp_path: Path) -> None:
    """Megatron-core has one switch for all: those of the MLP are written as zeros and do not come back."""
    folder = make_llama(tmp_path / "m", biases=True)
    config = json.loads((folder / "config.json").read_text()) | {"mlp_bias": False}
    (folder / "config.json").write_text(json.dumps(config))
    held = {
        n: t for n, t in load_file(folder / "model.safetensors").items() if "mlp" not in n or "weight" in n
    }
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    write_megatron(view_of(CheckpointReader(folder)), initialize(), tmp_path / "out")
    assert_same(MegatronReader(tmp_path / "out"), CheckpointReader(folder))


def test_names_depend_on_no_ranks(written: Path) -> None:
    """Layers have their number in the whole model, tensors their whole shape: no layout of ranks is in the names."""
    metadata = dcp.FileSystemReader(written / "release").read_metadata().state_dict_metadata
    sizes = {k: tuple(v.size) for k, v in metadata.items() if isinstance(v, dcp.TensorStorageMetadata)}
    assert {int(k.split(".")[2]) for k in sizes if k.startswith("decoder.layers.")} == {0, 1, 2}
    assert sizes["decoder.layers.2.mlp.linear_fc1.weight"] == (96, 48)
    assert sizes["decoder.layers.1.attention_norm_weight"] == (6, 48)


def test_experts_are_pieces_of_one_tensor(family_models: Callable) -> None:
    """As Megatron-core stacks them, each to be read by itself. The norm in front of them has the names of both of its
    layer specs."""
    folder = family_models("mixtral", "megatron") / "release"
    metadata = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    stacked = metadata["decoder.layers.2.mlp.experts.experts.linear_fc1.weight"]
    assert tuple(stacked.size) == (5, 96, 48)
    assert [tuple(chunk.offsets) for chunk in stacked.chunks] == [(i, 0, 0) for i in range(5)]
    assert {tuple(chunk.sizes) for chunk in stacked.chunks} == {(1, 96, 48)}
    layer = "decoder.layers.2."
    assert {f"{layer}pre_mlp_layernorm.weight", f"{layer}mlp.linear_fc1.layer_norm_weight"} <= metadata.keys()


def test_one_parameter_at_a_time_is_read(base: Path, tmp_path: Path) -> None:
    reader, asked = CheckpointReader(base), []

    class Counting(CheckpointReader):
        def get(self, name: str, check_finite: bool = True) -> torch.Tensor:
            asked.append(name)
            return super().get(name, check_finite)

    write_megatron(view_of(Counting(base)), initialize(), tmp_path / "out")
    assert sorted(asked) == sorted(reader.names())


def restored(written: Path, out: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """The torch_dist checkpoint with its tensors edited, as another program would have written it; returns ``out``."""
    shutil.copytree(written / "release", out, ignore=shutil.ignore_patterns("*.distcp", ".metadata"))
    store = DistStore(written / "release")
    tensors = {name: store.load(name) for name in store.names()}
    edit(tensors)
    write_dist(out, {n: t.to("meta") for n, t in tensors.items()}, lambda name, _: tensors[name], {})
    return out


def stack_layers(tensors: dict[str, torch.Tensor]) -> None:
    for part in ("input_layernorm.weight", "mlp.linear_fc2.weight"):
        layers = [tensors.pop(f"decoder.layers.{i}.{part}") for i in range(3)]
        tensors[f"decoder.layers.{part}"] = torch.stack(layers)


def split_gate_and_up(tensors: dict[str, torch.Tensor]) -> None:
    for i in range(3):
        name = f"decoder.layers.{i}.mlp.linear_fc1.weight"
        tensors[f"{name}_w"], tensors[f"{name}_v"] = tensors.pop(name).clone().chunk(2)


def pad_vocabulary(tensors: dict[str, torch.Tensor]) -> None:
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        tensors[name] = torch.cat([tensors[name], torch.ones(60, 48)])


@pytest.mark.parametrize("layout", [stack_layers, split_gate_and_up, pad_vocabulary])
def test_layouts_of_other_writers(written: Path, spd: Path, tmp_path: Path, layout: Callable) -> None:
    assert_same(MegatronReader(restored(written, tmp_path / "out", layout)), CheckpointReader(spd))


# ---- what is refused ----------------------------------------------------------------------------------------------


def of_dist(edit: Callable[[Path], object]) -> Callable[[Path, Path, Path], MegatronReader]:
    def read(base: Path, written: Path, out: Path) -> MegatronReader:
        shutil.copytree(written, out)
        edit(out / "release")
        return MegatronReader(out)

    return read


def of_tensors(edit: Callable[[dict[str, torch.Tensor]], object]) -> Callable[..., MegatronReader]:
    return lambda base, written, out: MegatronReader(restored(written, out, edit))


def of_legacy(edit: Callable[[Path], object] | None = None, **options: Any) -> Callable[..., MegatronReader]:
    def read(base: Path, written: Path, out: Path) -> MegatronReader:
        write_legacy(base, out, **options)
        if edit is not None:
            edit(out / "iter_0000007")
        return MegatronReader(out, base)

    return read


def other_model(base: Path, written: Path, out: Path) -> MegatronReader:
    return MegatronReader(
        written, make_llama(out / "other", heads=8, kv=4, head_dim=6, hidden=48, tied=False)
    )


def truncated(name: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = folder / name
        file.write_bytes(file.read_bytes()[:-200])

    return edit


class Malicious:
    """Pickled as a call that writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def malicious_metadata(folder: Path) -> None:
    import pickle

    (folder / ".metadata").write_bytes(pickle.dumps(Malicious(folder.parent / "hacked")))


def malicious_rank(folder: Path) -> None:
    state = {"model": {}, "args": Malicious(folder.parent / "hacked")}
    torch.save(state, folder / "mp_rank_00" / "model_optim_rng.pt")


def uneven_chunks(folder: Path) -> None:
    file = folder / "mp_rank_00_001" / "model_optim_rng.pt"
    state = torch.load(file, weights_only=False)
    torch.save(state | {"model0": state["model"], "model1": state["model"]}, file)


FC1 = "decoder.layers.1.mlp.linear_fc1.weight"

REFUSED: dict[str, tuple[Callable[..., MegatronReader], str]] = {
    "no folder": (lambda base, written, out: MegatronReader(out), "no folder"),
    "a plain folder": (lambda base, written, out: MegatronReader(base), "is no Megatron checkpoint"),
    "tracker of nothing": (
        lambda base, written, out: MegatronReader(_tracker(out, "12")),
        "names iter_0000012, in which there is no checkpoint",
    ),
    "tracker of nonsense": (lambda base, written, out: MegatronReader(_tracker(out, "../x")), "holds '../x'"),
    "no config": (of_dist(lambda f: (f / "config.json").unlink()), "as --hf-config"),
    "unfinished": (of_dist(lambda f: (f / "metadata.json").unlink()), "not written to its end"),
    "other format": (
        of_dist(lambda f: (f / "metadata.json").write_text('{"sharded_backend": "zarr"}')),
        "of format 'zarr', expected 'torch_dist'",
    ),
    "format of nothing": (
        of_dist(lambda f: (f / "metadata.json").write_text("[]")),
        "does not say the format",
    ),
    "missing shard": (of_dist(lambda f: (f / "__0_0.distcp").unlink()), "lacks __0_0.distcp"),
    "truncated shard": (of_dist(truncated("__0_0.distcp")), "is truncated"),
    "missing metadata": (of_dist(lambda f: (f / ".metadata").unlink()), "has no .metadata"),
    "truncated metadata": (of_dist(truncated(".metadata")), ".metadata is damaged"),
    "malicious metadata": (of_dist(malicious_metadata), "pathlib.Path.touch), which could run code"),
    "missing parameter": (of_tensors(lambda t: t.pop(FC1)), f"lacks parameter {FC1}"),
    "foreign parameter": (
        of_tensors(lambda t: t.update({"decoder.layers.0.mlp.router.weight": torch.ones(2, 48)})),
        "holds parameter decoder.layers.0.mlp.router.weight",
    ),
    "a bias that the config has not": (
        of_tensors(lambda t: t.update({FC1.replace("weight", "bias"): torch.ones(96)})),
        "linear_fc1.bias, which",
    ),
    "wrong shape": (of_tensors(lambda t: t.update({FC1: t[FC1][:90]})), "config.json asks for [48, 48]"),
    "wrong dtype": (of_tensors(lambda t: t.update({FC1: t[FC1].to(torch.int8)})), "torch.int8"),
    "not a number": (of_tensors(lambda t: t[FC1].fill_(float("nan"))), "NaN or infinite"),
    "another model's config": (other_model, "config.json"),
    "missing rank": (
        of_legacy(lambda f: shutil.rmtree(f / "mp_rank_01"), ranks=3),
        "none of rank 1 of stage 0",
    ),
    "last rank missing": (
        of_legacy(lambda f: shutil.rmtree(f / "mp_rank_02"), ranks=3),
        "tensor_model_parallel_size = 2, but was saved with 3",
    ),
    "rank without a file": (
        of_legacy(lambda f: (f / "mp_rank_01" / "model_optim_rng.pt").unlink(), ranks=2),
        "has no model_optim_rng.pt",
    ),
    "truncated rank": (of_legacy(truncated("mp_rank_00/model_optim_rng.pt")), "is truncated"),
    "experts": (
        of_legacy(lambda f: (f / "mp_rank_00").rename(f / "mp_rank_00_000_000")),
        "of a layout that is not read here",
    ),
    "old version": (of_legacy(checkpoint_version=1.0), "checkpoint_version 1.0, expected 2.0"),
    "no model": (of_legacy(model=None), "has no model"),
    "chunks of several models": (of_legacy(uneven_chunks, stages=(1, 2)), "of [1, 2] model chunks"),
    "spread experts": (
        of_legacy(args=argparse.Namespace(expert_model_parallel_size=2)),
        "saved with expert_model_parallel_size = 2, expected 1",
    ),
    "malicious rank": (of_legacy(malicious_rank), "which could run code"),
}


def _tracker(folder: Path, content: str) -> Path:
    folder.mkdir()
    (folder / "latest_checkpointed_iteration.txt").write_text(content)
    return folder


def read_all(reader: MegatronReader) -> None:
    for name in reader.names():
        reader.get(name)


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_said(base: Path, written: Path, tmp_path: Path, case: str) -> None:
    read, words = REFUSED[case]
    with pytest.raises(CheckpointError) as error:
        read_all(read(base, written, tmp_path / "out"))
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.rglob("hacked"))


def test_an_output_that_holds_something_is_kept(base: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="already holds something else"):
        write_megatron(view_of(CheckpointReader(base)), initialize(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("case", "part", "parameter"),
    [
        ("qwen2", "self_attn.k_proj", "self_attention.linear_qkv"),
        ("mixtral", "block_sparse_moe.experts.3.w2", "mlp.experts.local_experts.3.linear_fc2"),
    ],
)
def test_mixed_dtypes_of_what_becomes_one_parameter(
    family_models: Callable, tmp_path: Path, case: str, part: str, parameter: str
) -> None:
    folder = shutil.copytree(family_models(case, "hf"), tmp_path / "m")
    held = load_file(folder / "model.safetensors")
    name = f"model.layers.1.{part}.weight"
    held[name] = held[name].to(torch.bfloat16)
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"layers.1.{parameter}.weight is made of tensors of"):
        write_megatron(view_of(CheckpointReader(folder)), initialize(), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def with_object(folder: Path, out: Path, item: Any, common: bool) -> Path:
    """A copy of a torch_dist folder with ``item`` among its objects, and with ``common.pt`` (as Megatron-core 0.16
    writes) or without it (0.19)."""
    out = shutil.copytree(folder, out)
    store, held = DistStore(out / "release"), out / "release"
    state: dict[str, Any] = {name: store.load(name) for name in store.names()}
    for file in held.glob("*.distcp"):
        file.unlink()
    write_dist(held, state | {"common_state/shard_0_1": item}, lambda name, _: state[name], {})
    if not common:
        (held / "common.pt").unlink()
    return out


def test_objects_are_looked_through_before_megatron_core_loads_them(written: Path, tmp_path: Path) -> None:
    harmless = {"args": argparse.Namespace(lr=1.0), "state": io.BytesIO(b"x"), "none": [None]}
    DistStore(with_object(written, tmp_path / "harmless", harmless, common=False) / "release").check_objects()
    target = tmp_path / "hacked"
    for common in (False, True):
        bad = with_object(written, tmp_path / f"bad{common}", [Malicious(target)], common)
        with pytest.raises(CheckpointError, match="could run code"):
            DistStore(bad / "release").check_objects()
        # Converting reads tensors only.
        DistStore(bad / "release").load(FC1)
    assert not target.exists()


def test_a_live_model_takes_its_own_plan_only(spd: Path, written: Path, tmp_path: Path) -> None:
    runtime, reader = initialize(), CheckpointReader(spd)
    plan = reader.plan
    assert plan is not None
    model = build_gpt_model(
        model_shape(reader), plan, final_weights(reader, plan), reader.get, runtime, torch.float32
    )
    load_model(model, plan, runtime, written)
    with pytest.raises(PlanError, match="they differ in sync_points"):
        load_model(model, plan.with_drops([0]), runtime, written)
    hacked = shutil.copytree(written, tmp_path / "hacked_files")
    malicious_metadata(hacked / "release")
    with pytest.raises(CheckpointError, match="could run code"):
        load_model(model, plan, runtime, hacked)
    assert not (hacked / "hacked").exists()
    small = restored(written, tmp_path / "small", lambda t: t.update({FC1: t[FC1][:90]}))
    with pytest.raises(CheckpointError, match="does not fit the model"):
        load_model(model, plan, runtime, small)
    shutdown()
