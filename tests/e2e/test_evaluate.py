"""The command ``evaluate``: a model alone, against another, on tasks; a small random model and the real one."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from megatron_spd.calibration.text import embedded_text
from megatron_spd.checkpoint.hf import CheckpointReader
from megatron_spd.checkpoint.remote_code.modeling_spd import SPDLlamaForCausalLM
from tests.command_line import answer, command
from tests.e2e.bad_input import assert_one_line
from tests.models import make_export, make_llama, tiny_text, tiny_tokenizer

SEQUENCES, LENGTH = 6, 16
BRANCHES, DROPPED = 2, [0, 1, 4]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model ``plain``, its export ``spd``, and the text ``text``."""
    folder = tmp_path_factory.mktemp("work")
    make_export(make_llama(folder / "plain"), folder / "spd", BRANCHES, DROPPED)
    (folder / "text").write_text(tiny_text(), encoding="utf-8")
    return folder


def arguments(work: Path, model: str = "spd") -> list[object]:
    data = ["--data", work / "text", "--sequences", SEQUENCES, "--seq-length", LENGTH]
    return ["evaluate", "--model", work / model, *data]


@torch.no_grad()
def losses(model: LlamaForCausalLM, work: Path) -> Tensor:
    """transformers' own loss of each piece: the mean of -log p over its scored tokens, float64 [SEQUENCES]."""
    ids = tiny_tokenizer()((work / "text").read_text(), add_special_tokens=False)["input_ids"]
    pieces = torch.tensor(ids[: SEQUENCES * LENGTH]).view(SEQUENCES, 1, LENGTH)
    return torch.stack([model(t, labels=t).loss.double() for t in pieces])


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_model_against_another(work: Path, ranks: int) -> None:
    found = answer(*arguments(work), "--against", work / "plain", "--ranks", ranks)
    plain = losses(LlamaForCausalLM.from_pretrained(work / "plain"), work)
    spd = losses(SPDLlamaForCausalLM.from_pretrained(work / "spd"), work)
    assert found["perplexity"] == pytest.approx(float(spd.mean().exp()), rel=1e-4)
    assert (found["kind"], found["dropped"], found["tokens"]) == ("spd", DROPPED, SEQUENCES * (LENGTH - 1))
    other = found["against"]
    assert other["perplexity"] == pytest.approx(float(plain.mean().exp()), rel=1e-4)
    assert (other["kind"], other["dropped"]) == ("plain", [])
    ratio = math.exp(float((spd - plain).mean()))
    assert other["increase"] == pytest.approx(100 * (ratio - 1), rel=1e-3)
    for value, (low, high) in (
        (found["perplexity"], found["interval"]),
        (other["perplexity"], other["interval"]),
        (other["increase"], other["increase_interval"]),
    ):
        assert low < value < high


def test_tasks_and_generation(work: Path) -> None:
    asked = ["--tasks", "spd_next_word,spd_continuation", "--limit", 20, "--generation"]
    found = answer(*arguments(work), "--against", work / "plain", *asked, "--max-new-tokens", 10)
    for tasks in (found["tasks"], found["against"]["tasks"]):
        assert tasks.keys() == {"spd_next_word", "spd_continuation"}
        assert all(task["documents"] == 20 for task in tasks.values())
        assert 0 <= tasks["spd_continuation"]["acc_norm"]["value"] <= 1
    generation = found["generation"]
    assert (generation["prompts"], generation["new_tokens"]) == (SEQUENCES, 10)
    assert 0 <= generation["agreement"] < 1
    assert 0 <= generation["same_prefix"] < 10


def test_a_model_is_like_itself(work: Path) -> None:
    same = [*arguments(work, "plain"), "--against", work / "plain", "--generation", "--max-new-tokens", 10]
    found = answer(*same)
    assert found["against"]["increase"] == 0
    assert found["against"]["increase_interval"] == [0, 0]
    assert [found["generation"][k] for k in ("agreement", "same_prefix", "rouge_l")] == [1, 10, 1]
    printed = command(*same).out
    assert "(plain): perplexity" in printed
    assert "perplexity increase: +0.00 % (95 %, paired: +0.00 to +0.00 %)" in printed
    assert "100.0 % of the next tokens agree, the first 10.0 tokens are the same, ROUGE-L 100.0 %" in printed


def test_one_piece_gives_no_interval(work: Path) -> None:
    one = [*arguments(work), "--sequences", 1]
    assert answer(*one)["interval"] == [None, None]
    assert "95 %" not in command(*one).out


def test_mistakes_are_one_line(work: Path, tmp_path: Path) -> None:
    good = arguments(work)
    other = make_llama(tmp_path / "other", with_tokenizer=False)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(other)
    against = ["--against", work / "plain"]
    for more, words in (
        (["--generation"], "give the plain model with --against"),
        (["--limit", 5], "give some with --tasks"),
        (["--tasks", "spd_next_word", "--limit", 0], "--limit is 0; it must be >= 1"),
        (["--tasks", "spd_next_word", "--ranks", 2], "--tasks runs on one process, not on 2 ranks"),
        ([*against, "--generation", "--ranks", 2], "--generation runs on one process"),
        (["--tasks", ","], "give task names separated by commas"),
        (["--against", work / "nowhere"], "no model folder"),
        (["--against", other], "have different vocabularies"),
    ):
        assert_one_line(command(*good, *more), words)


def test_ranks_of_a_foreign_launcher_count_too(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    outcome = command(*arguments(work), "--tasks", "spd_next_word")
    assert_one_line(outcome, "--tasks runs on one process, not on 2 ranks")


@pytest.mark.slow
def test_the_real_model_knows_what_follows(smollm2: Path, tmp_path: Path) -> None:
    """SmolLM2-135M finds the endings far more often than chance (1 in 4); with its attention points dropped, less."""
    reader = CheckpointReader(smollm2)
    spd = make_export(smollm2, tmp_path / "spd", 3, list(range(0, 2 * reader.num_layers, 2)))
    (tmp_path / "text").write_text(embedded_text()[:20_000], encoding="utf-8")
    data = ["--data", tmp_path / "text", "--sequences", 2, "--seq-length", 64]
    tasks = ["--tasks", "spd_next_word,spd_continuation", "--limit", 16]
    found = answer("evaluate", "--model", spd, "--against", smollm2, *data, *tasks)
    plain = found["against"]["tasks"]
    # By chance alone 10 or more of 16 happen once in 600 times.
    assert plain["spd_continuation"]["acc"]["value"] >= 10 / 16
    assert plain["spd_next_word"]["acc"]["value"] > 0
    assert found["tasks"]["spd_continuation"]["acc"]["value"] < plain["spd_continuation"]["acc"]["value"]
    assert found["against"]["increase_interval"][0] > 100
