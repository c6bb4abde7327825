"""The plug-ins for Megatron-LM's tools/checkpoint/convert.py, driven as it drives them: a saver in a process of its own
behind a queue, the loader in front of it."""

from __future__ import annotations

import argparse
import importlib.util
import queue
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from megatron_spd.checkpoint.hf import CheckpointReader
from megatron_spd.errors import CheckpointError, UserError
from megatron_spd.exchange import receive_model, send_model
from tests.families import make_model
from tests.megatron_files import write_legacy
from tests.models import make_export, make_llama

TOOLS = Path(__file__).parents[2] / "tools" / "checkpoint"


#: Those of which Megatron-LM's messages do not hold everything.
FAMILIES = ["qwen3", "opt", "mixtral", "qwen3_moe"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    make_llama(root / "plain", tied=False, biases=True)
    make_llama(root / "tied", dtype=torch.bfloat16)
    make_export(root / "plain", root / "spd", 2, [0, 1], [(0, "mlp")], norms=[(1, "attention")])
    write_legacy(root / "plain", root / "legacy", ranks=2)
    for family in FAMILIES:
        make_model(family, root / family)
    return root


def plugin(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def save(messages: Any, args: argparse.Namespace) -> None:
    plugin("saver_spd").save_checkpoint(messages, args)


def convert(load: Path, out: Path, hf_config: Path | None = None) -> int | None:
    """What the script does with both plug-ins; the exit code of the saver."""
    parser = argparse.ArgumentParser(conflict_handler="resolve")
    parser.add_argument("--load-dir")
    parser.add_argument("--save-dir")
    for name in ("loader_spd", "saver_spd"):
        plugin(name).add_arguments(parser)
    args = parser.parse_args(["--load-dir", str(load), "--save-dir", str(out)])
    args.saver, args.model_type, args.checking = "spd", "GPT", True
    args.hf_config = None if hf_config is None else str(hf_config)
    context = mp.get_context("fork")
    messages = context.Queue(maxsize=3)
    saver = context.Process(target=save, args=(messages, args))
    saver.start()
    try:
        plugin("loader_spd").load_checkpoint(messages, args)
    finally:
        saver.join(60)
    return saver.exitcode


@pytest.mark.parametrize("kind", ["plain", "tied", "spd", *FAMILIES])
def test_a_model_goes_through_the_queue(models: Path, tmp_path: Path, kind: str) -> None:
    assert convert(models / kind, tmp_path / "out") == 0
    given, wanted = CheckpointReader(tmp_path / "out"), CheckpointReader(models / kind)
    assert given.fingerprint() == wanted.fingerprint()
    assert given.config == wanted.config
    assert all(torch.equal(given.get(name), wanted.get(name)) for name in wanted.names())


def test_a_megatron_checkpoint_goes_through_the_queue(models: Path, tmp_path: Path) -> None:
    assert convert(models / "legacy", tmp_path / "out", models / "plain") == 0
    assert (
        CheckpointReader(tmp_path / "out").fingerprint() == CheckpointReader(models / "plain").fingerprint()
    )


def test_a_loader_that_fails_ends_the_saver(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        convert(models / "nothing", tmp_path / "out")
    assert end.value.code == 2
    assert "loader_spd: error: no folder" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def sent(model: Path, saver: str = "spd") -> list[Any]:
    """The messages of the loader."""
    messages: queue.Queue = queue.Queue()
    send_model(messages, CheckpointReader(model), saver, "GPT")
    return list(messages.queue)


def received(messages: Iterable[Any], out: Path, **options: Any) -> str:
    """As the saver reads them. Nothing may be left on the queue."""
    waiting: queue.Queue = queue.Queue()
    for message in messages:
        waiting.put(message)
    try:
        return receive_model(waiting, out, options.pop("hf_config", None), **options)
    finally:
        assert waiting.empty()


def test_the_messages_are_those_of_the_protocol(models: Path) -> None:
    settings, *messages, end = sent(models / "plain", saver="core")
    assert [m["name"] for m in messages] == [
        "embeddings",
        *(f"transformer layer {i}" for i in range(3)),
        "final norm",
        "output layer",
    ]
    assert end == "done"
    layer = {entry: tuple(t.shape) for entry, t in messages[1].items() if entry != "name"}
    assert layer == {
        "input norm weight": (32,),
        "qkv weight": (64, 32),
        "qkv bias": (64,),
        "dense weight": (32, 32),
        "dense bias": (32,),
        "post norm weight": (32,),
        "mlp l0 weight W": (48, 32),
        "mlp l0 weight V": (48, 32),
        "mlp l0 bias W": (48,),
        "mlp l0 bias V": (48,),
        "mlp l1 weight": (32, 48),
        "mlp l1 bias": (32,),
    }
    assert settings.swiglu
    assert settings.qkv_bias
    assert settings.output_layer
    assert settings.true_vocab_size == 324
    assert settings.checkpoint_args.num_query_groups == 2


def test_an_spd_model_goes_to_no_saver_that_would_lose_its_plan(models: Path) -> None:
    with pytest.raises(UserError, match="saver 'core' would lose its plan"):
        sent(models / "spd", saver="core")
    with pytest.raises(UserError, match="expected GPT"):
        send_model(queue.Queue(), CheckpointReader(models / "plain"), "spd", "BERT")


@pytest.mark.parametrize(
    ("family", "tensor"),
    [("qwen3", "q_norm"), ("mixtral", "gate.weight"), ("opt", "embed_positions")],
)
def test_a_model_of_which_a_saver_would_lose_something_is_not_sent(
    models: Path, family: str, tensor: str
) -> None:
    with pytest.raises(UserError, match=rf"{tensor}.*give --saver spd"):
        sent(models / family, saver="core")


def without(messages: list[Any], name: str) -> list[Any]:
    return [m for m in messages if not (isinstance(m, dict) and m["name"] == name)]


def with_entry(messages: list[Any], entry: str) -> list[Any]:
    messages[2][entry] = torch.ones(3)
    return messages


REFUSED = {
    "the loader ended at once": (lambda m: ["exit"], "ended before it sent a model"),
    "the loader ended later": (lambda m: [*m[:3], "exit"], "ended before it sent all"),
    "a layer is missing": (lambda m: without(m, "transformer layer 1"), "expected 'transformer layer 1'"),
    "the last layer is missing": (
        lambda m: without(m, "transformer layer 2"),
        "lacks parameter decoder.layers.2.",
    ),
    "foreign message": (lambda m: [*m[:2], {"name": "pooler"}, *m[2:]], "sent 'pooler'"),
    "foreign entry": (lambda m: with_entry(m, "router weight"), "has 'router weight'"),
    "no config": (lambda m: [SimpleNamespace(), *m[1:]], "as --hf-config"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_with_messages_is_said(models: Path, tmp_path: Path, case: str) -> None:
    change, words = REFUSED[case]
    with pytest.raises(CheckpointError, match=words.replace(".", r"\.")):
        received(change(sent(models / "plain")), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_entries_may_be_passed_over(models: Path, tmp_path: Path) -> None:
    messages = with_entry(sent(models / "plain"), "router weight")
    fingerprint = received(messages, tmp_path / "out", checking=False)
    assert fingerprint == CheckpointReader(models / "plain").fingerprint()
