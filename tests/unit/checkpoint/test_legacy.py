"""Files of ranks, `mp_rank_XX`, put together again: any layout that Megatron-LM writes. What is refused:
test_megatron.py."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_spd.checkpoint.hf import CheckpointReader
from megatron_spd.checkpoint.megatron import MegatronReader
from tests.families import make_model
from tests.megatron_files import OLD_NAMES, assert_same, write_legacy
from tests.models import make_llama


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(
        tmp_path_factory.mktemp("base") / "m", heads=12, kv=6, head_dim=4, hidden=48, tied=False
    )


LEGACY: dict[str, dict[str, Any]] = {
    "one rank": {},
    "three ranks, padded": {"ranks": 3, "padding": 6},
    "two ranks, uneven pipeline": {"ranks": 2, "stages": (1, 2)},
    "old names": {"ranks": 2, "names": OLD_NAMES},
    "fused norms": {
        "names": {
            ".input_layernorm.": ".self_attention.linear_qkv.layer_norm_",
            ".pre_mlp_layernorm.": ".mlp.linear_fc1.layer_norm_",
        }
    },
}


#: Transformer Engine has the weights of all experts in one module.
GROUPED = {
    f".mlp.experts.local_experts.{i}.linear_{fc}.weight": f".mlp.experts.linear_{fc}.weight{i}"
    for i in range(5)
    for fc in ("fc1", "fc2")
}
LEGACY_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "opt": ("opt", {"ranks": 2, "stages": (1, 2)}),
    "opt, old names": ("opt", {"names": OLD_NAMES}),
    "mixtral": ("mixtral", {"ranks": 2, "stages": (2, 1), "padding": 6}),
    "mixtral, grouped": ("mixtral", {"ranks": 2, "names": GROUPED}),
    "qwen3_moe": ("qwen3_moe", {"ranks": 4}),
}


@pytest.mark.parametrize("variant", LEGACY_FAMILIES.values(), ids=LEGACY_FAMILIES)
def test_files_of_ranks_of_other_families(tmp_path: Path, variant: tuple[str, dict[str, Any]]) -> None:
    case, layout = variant
    base = make_model(case, tmp_path / "m")
    assert_same(MegatronReader(write_legacy(base, tmp_path / "out", **layout), base), CheckpointReader(base))


def test_an_interleaved_pipeline(tmp_path: Path) -> None:
    """The first of two stages has layers 0 and 2."""
    base = make_llama(tmp_path / "m", layers=4)
    out = write_legacy(base, tmp_path / "out", ranks=2, stages=(2, 2), chunks=2)
    assert_same(MegatronReader(out, base), CheckpointReader(base))


def test_rows_of_positions_that_nothing_has_are_zeros(tmp_path: Path) -> None:
    """Megatron itself has no place for OPT's first two, and a config alone no weights to take them from."""
    base = make_model("opt", tmp_path / "m")
    config = tmp_path / "config"
    shutil.copytree(base, config, ignore=shutil.ignore_patterns("*.safetensors"))
    read = MegatronReader(write_legacy(base, tmp_path / "out"), config)
    name = "model.decoder.embed_positions.weight"
    with pytest.warns(UserWarning, match="lacks the first 2 rows"):
        table = read.get(name)
    assert not table[:2].any()
    assert torch.equal(table[2:], CheckpointReader(base).get(name)[2:])


@pytest.mark.parametrize("variant", LEGACY.values(), ids=LEGACY)
def test_files_of_ranks_are_put_together(base: Path, tmp_path: Path, variant: dict[str, Any]) -> None:
    assert_same(MegatronReader(write_legacy(base, tmp_path / "out", **variant), base), CheckpointReader(base))


def test_old_files_keep_their_model_in_nested_dicts(base: Path, tmp_path: Path) -> None:
    out = write_legacy(base, tmp_path / "out", names=OLD_NAMES)
    file = out / "iter_0000007" / "mp_rank_00" / "model_optim_rng.pt"
    state = torch.load(file, weights_only=False)
    prefix = "language_model.encoder."
    inner = {k.removeprefix(prefix): v for k, v in state["model"].items() if k.startswith(prefix)}
    others = {k.split(".", 1)[1]: v for k, v in state["model"].items() if not k.startswith(prefix)}
    state["model"] = {"language_model": {"encoder": inner, **others}}
    torch.save(state, file)
    assert_same(MegatronReader(out, base), CheckpointReader(base))


def test_what_megatron_keeps_beside_weights_is_passed_over(base: Path, tmp_path: Path) -> None:
    import numpy as np
    from megatron.core.enums import ModelType

    state = {"rng_state": [{"np_rng_state": np.random.get_state()}], "kind": ModelType.encoder_or_decoder}
    folder = write_legacy(base, tmp_path / "out", **state)
    function = np.random.get_state()[1].__reduce__()[0]
    # As DeepSpeed and Megatron-core do where they are imported.
    with torch.serialization.safe_globals([function, np.ndarray]):
        assert_same(MegatronReader(folder, base), CheckpointReader(base))
        assert {function, np.ndarray} <= set(torch.serialization.get_safe_globals())
