"""Two lm-eval tasks whose data every installation can build: no network, no files.

Both ask about prose paragraphs of the embedded text (:func:`megatron_spd.calibration.text.embedded_text`), from its
second third on: what is calibrated on comes from its start. The text belongs to the Python that runs, so numbers
compare between models on one Python version, not between versions.

- ``spd_next_word``: the last word of a passage, in the manner of LAMBADA: a word that the passage has used before.
- ``spd_continuation``: which of four endings continues a passage, in the manner of HellaSwag: the three others continue
  other passages. Chance is 25 %.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from typing import Any

from megatron_spd.calibration.text import embedded_text

#: Words that a passage must have at least, that are given as context, and that an ending has.
_PASSAGE_WORDS, _CONTEXT_WORDS, _ENDING_WORDS = 36, 24, 12
#: Share of a paragraph's words that must be plain words for it to be prose and not code or a grammar rule.
_PROSE = 0.8
_CHOICES = 4
_SEED = 0

# The quotation marks and the apostrophe of print too.
_PLAIN_WORD = re.compile(r"[\"\u201c(]?[A-Za-z'\u2019-]+[\"\u201d)]?[.,;:)]?")
#: What can be asked for: letters only, so that no punctuation has to be guessed, and no short function word.
_ASKED_WORD = re.compile(r"[A-Za-z]{4,}")


def passages() -> list[list[str]]:
    """The words of each prose paragraph of at least 36 words in the last two thirds of the text; none twice, and none
    that the first third has too."""
    text = embedded_text()
    paragraphs = [tuple(paragraph.split()) for paragraph in text.split("\n\n")]
    cut = text[: len(text) // 3].count("\n\n") + 1
    later = dict.fromkeys(paragraphs[cut:])
    known = set(paragraphs[:cut])
    return [
        list(words)
        for words in later
        if len(words) >= _PASSAGE_WORDS and words not in known and _prose(words)
    ]


def _prose(words: Sequence[str]) -> bool:
    return sum(bool(_PLAIN_WORD.fullmatch(word)) for word in words) >= _PROSE * len(words)


def next_word_documents() -> list[dict[str, Any]]:
    """For each passage ``context`` and ``word``: the first word behind the 24th that the passage has used before, and
    all that precedes it. Passages without such a word are left out."""
    documents = []
    for words in passages():
        known = {word.lower() for word in words[:_CONTEXT_WORDS]}
        for i, word in enumerate(words[_CONTEXT_WORDS:], start=_CONTEXT_WORDS):
            if _ASKED_WORD.fullmatch(word) and word.lower() in known:
                documents.append({"context": " ".join(words[:i]), "word": word})
                break
            known.add(word.lower())
    return documents


def continuation_documents() -> list[dict[str, Any]]:
    """For each passage ``context`` (24 words), ``choices`` (four endings of 12 words) and ``label``, the place of the
    right one. The wrong ones and the places are drawn from a fixed seed."""
    generator = random.Random(_SEED)
    starts = [" ".join(words[:_CONTEXT_WORDS]) for words in passages()]
    endings = [" ".join(words[_CONTEXT_WORDS:][:_ENDING_WORDS]) for words in passages()]
    documents = []
    for start, ending in zip(starts, endings, strict=True):
        choices = generator.sample([other for other in endings if other != ending], _CHOICES - 1)
        label = generator.randrange(_CHOICES)
        choices.insert(label, ending)
        documents.append({"context": start, "choices": choices, "label": label})
    return documents


def _dataset(documents: Callable[[], list[dict[str, Any]]]) -> Callable[..., dict[str, Any]]:
    """``documents`` in the form that lm-eval asks a custom dataset for."""

    def splits(**_: Any) -> dict[str, Any]:
        import datasets

        return {"test": datasets.Dataset.from_list(documents())}

    return splits


def _mean(metric: str) -> dict[str, Any]:
    return {"metric": metric, "aggregation": "mean", "higher_is_better": True}


#: lm-eval's configuration of each task, by its name.
LOCAL_TASKS: dict[str, dict[str, Any]] = {
    "spd_next_word": {
        "task": "spd_next_word",
        "custom_dataset": _dataset(next_word_documents),
        "test_split": "test",
        "output_type": "loglikelihood",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{' ' + word}}",
        "metric_list": [_mean("acc")],
        "metadata": {"version": 1.0},
    },
    "spd_continuation": {
        "task": "spd_continuation",
        "custom_dataset": _dataset(continuation_documents),
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "metric_list": [_mean("acc"), _mean("acc_norm")],
        "metadata": {"version": 1.0},
    },
}
