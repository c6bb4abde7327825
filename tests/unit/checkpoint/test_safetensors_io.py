"""Writing a model in shards as it streams."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from megatron_spd.checkpoint import safetensors_io
from megatron_spd.checkpoint.safetensors_io import ShardWriter, read_header, read_tensor
from megatron_spd.errors import CheckpointError, UserError
from tests.disk import small_disk


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {f"t{i}": torch.randn(8, 16, generator=generator) for i in range(5)}  # 512 bytes each


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
    return found


@pytest.mark.parametrize(("limit", "files"), [(10**6, 1), (1100, 3), (1, 5)])
def test_shards(tmp_path: Path, limit: int, files: int) -> None:
    writer = ShardWriter(tmp_path, max_shard_bytes=limit)
    for name, tensor in tensors().items():
        writer.add(name, tensor)
    writer.close()
    names = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    if files == 1:
        assert names == ["model.safetensors"]
        assert not (tmp_path / "model.safetensors.index.json").exists()
    else:
        assert names == [f"model-{i + 1:05d}-of-{files:05d}.safetensors" for i in range(files)]
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == 5 * 512
        for name, file in index["weight_map"].items():
            assert name in read_header(tmp_path / file)
        assert sorted(index["weight_map"]) == sorted(tensors())
    found = read_all(tmp_path)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors().items())


def test_views_and_later_changes(tmp_path: Path) -> None:
    """Transposed and overlapping views are stored whole, as they were when added."""
    base = torch.arange(12.0).view(3, 4)
    writer = ShardWriter(tmp_path)
    writer.add("rows", base[:2])
    writer.add("transposed", base.T)
    expected = base.clone()
    base.zero_()
    writer.close()
    found = read_all(tmp_path)
    assert torch.equal(found["rows"], expected[:2])
    assert torch.equal(found["transposed"], expected.T)


def test_any_reader_finds_every_dtype_shape_and_name(tmp_path: Path) -> None:
    """Among them an odd number of bfloat16 in front of float32, a scalar, no values, and names that JSON escapes."""
    given = {
        "odd": torch.arange(3, dtype=torch.bfloat16),
        "float32": torch.arange(4.0),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        'a "quoted" name, ä': torch.ones(2, 3, dtype=torch.float16),
        "empty": torch.empty(0, 4),
    }
    writer = ShardWriter(tmp_path)
    for name, tensor in given.items():
        writer.add(name, tensor)
    writer.close()
    mine = {
        name: read_tensor(entry)
        for file in tmp_path.glob("*.safetensors")
        for name, entry in read_header(file).items()
    }
    for found in (read_all(tmp_path), mine):
        assert found.keys() == given.keys()
        for name, tensor in given.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor)


def test_a_full_header_starts_a_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_io, "_HEADER_BYTES", 256)
    writer = ShardWriter(tmp_path)
    for name, tensor in tensors().items():
        writer.add(name, tensor)
    writer.close()
    assert len(list(tmp_path.glob("*.safetensors"))) == 2  # entries take some seventy bytes
    found = read_all(tmp_path)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors().items())


def test_other_dtypes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"tensor mask has dtype torch\.int64; weights are stored as one of"
    ):
        ShardWriter(tmp_path).add("mask", torch.ones(2, dtype=torch.int64))
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_became_shorter(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path)
    writer.add("t", torch.ones(100))
    writer.close()
    entry = read_header(tmp_path / "model.safetensors")["t"]
    with entry.file.open("r+b") as file:
        file.truncate(entry.end - 8)
    with pytest.raises(CheckpointError, match="is truncated: it ends at"):
        read_tensor(entry)


def test_files_can_be_read_by_others(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path)
    writer.add("t", torch.ones(2))
    writer.close()
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    from megatron_spd.checkpoint.folders import atomic_folder

    def write_two_megabytes(out: Path) -> None:
        with atomic_folder(out) as folder:
            writer = ShardWriter(folder, max_shard_bytes=300_000)
            for i in range(8):
                writer.add(f"t{i}", torch.ones(64, 1024))
            writer.close()

    with small_disk(tmp_path / "disk", kilobytes=1024) as disk:
        with pytest.raises(UserError, match="no space left on the device while writing"):
            write_two_megabytes(disk / "out")
        assert list(disk.iterdir()) == []
