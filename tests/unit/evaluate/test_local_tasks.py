"""The documents of the local tasks: right, solvable, from text that is not calibrated on, always the same."""

from __future__ import annotations

from megatron_spd.calibration.text import embedded_text
from megatron_spd.evaluate.local_tasks import continuation_documents, next_word_documents, passages


def test_passages_are_prose_from_behind_the_first_third() -> None:
    found = passages()
    assert len(found) > 150
    text = embedded_text()
    paragraphs = [p.split() for p in text.split("\n\n")]
    first = paragraphs[: text[: len(text) // 3].count("\n\n")]
    assert all(words in paragraphs and words not in first for words in found)
    assert len({" ".join(words) for words in found}) == len(found)
    assert not any(">>>" in words or "::=" in words for words in found)


def test_the_asked_word_follows_and_was_read_before() -> None:
    texts = [" ".join(words) for words in passages()]
    documents = next_word_documents()
    assert len(documents) > 150
    for document in documents:
        context, word = document["context"], document["word"]
        assert any(text.startswith(f"{context} {word}") for text in texts)
        assert word.lower() in context.lower().split()
        assert len(context.split()) >= 24
        assert word.isalpha()
        assert len(word) >= 4


def test_one_ending_of_four_is_the_right_one() -> None:
    texts = [" ".join(words) for words in passages()]
    documents = continuation_documents()
    assert len(documents) == len(texts)
    for document, text in zip(documents, texts, strict=True):
        fits = [text.startswith(f"{document['context']} {choice}") for choice in document["choices"]]
        assert fits == [i == document["label"] for i in range(4)]
        assert len(set(document["choices"])) == 4
        assert {len(choice.split()) for choice in document["choices"]} == {12}
    labels = [document["label"] for document in documents]
    # No place is favoured: to name always the same one is no better than chance.
    assert max(labels.count(i) for i in range(4)) < 0.35 * len(labels)


def test_documents_are_the_same_every_time() -> None:
    assert next_word_documents() == next_word_documents()
    assert continuation_documents() == continuation_documents()
