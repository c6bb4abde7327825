"""Text, and the token batches cut from it.

One protocol for calibration and for scoring: contiguous pieces of equal length from the start of the text, without
special tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_spd.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Characters of the first attempt for each token that is needed; English text has about four.
_CHARS_PER_TOKEN = 6
#: Tokens at the end of a cut text that may differ from those of the whole text; cutting a word changes its last few.
_CUT_MARGIN = 256


def embedded_text() -> str:
    """The text used where the user names none: the standard library's help topics, about 0.7 MB of English prose."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def read_text(path: str | Path | None) -> str:
    """The UTF-8 text in the file ``path``; :func:`embedded_text` for None. Raises UserError where there is none."""
    if path is None:
        return embedded_text()
    path = Path(path)
    if not path.exists():
        raise UserError(
            f"no text file at {path}; give a UTF-8 text file, or leave --data out for the embedded text"
        )
    if not path.is_file():
        raise UserError(f"{path} is not a file; give one UTF-8 text file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); give a UTF-8 text file") from None
    if not text.strip():
        raise UserError(f"the text file {path} is empty; give a UTF-8 text file with something to read")
    return text


def token_batches(
    tokenizer: PreTrainedTokenizerBase, text: str, sequences: int, seq_length: int, skip: int = 0
) -> Tensor:
    """Contiguous pieces of ``seq_length`` tokens from the start of ``text``: int64 [sequences, seq_length].

    ``skip`` pieces of that length are passed over first, which gives a set disjoint from the first ``skip`` pieces. No
    beginning-of-sequence or other special token is added. Only as much of the text is tokenised as is needed.

    Raises UserError naming the tokens had and needed if the text is too short.
    """
    if sequences < 1 or seq_length < 1 or skip < 0:
        raise ValueError(
            f"sequences = {sequences} and seq_length = {seq_length} must be >= 1, skip = {skip} >= 0"
        )
    needed = (skip + sequences) * seq_length
    tokens = _first_tokens(tokenizer, text, needed)
    if len(tokens) < needed:
        passed = f" after skipping {skip}" if skip else ""
        raise UserError(
            f"the text has {len(tokens)} tokens, but {sequences} sequences of {seq_length}{passed} need {needed}; "
            "use fewer or shorter pieces (--seq-length, and the options that end in sequences), or give a longer text"
        )
    return torch.tensor(tokens[skip * seq_length : needed], dtype=torch.int64).view(sequences, seq_length)


def _first_tokens(tokenizer: PreTrainedTokenizerBase, text: str, needed: int) -> list[int]:
    """The first ``needed`` tokens of ``text``, or all of them if there are fewer."""
    chars = needed * _CHARS_PER_TOKEN
    while True:
        tokens = tokenizer(text[:chars], add_special_tokens=False, verbose=False)["input_ids"]
        if chars >= len(text) or len(tokens) >= needed + _CUT_MARGIN:
            return tokens[:needed]
        chars *= 2
