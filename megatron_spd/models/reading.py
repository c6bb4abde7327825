"""What family files share in reading a ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_spd.errors import UserError

#: Why a family, or a model of one, is refused whose norms follow its sublayers.
NORM_BEHIND = (
    "its blocks norm the sum that an all-reduce makes, and the norm of a partial sum is no part of that: a sync point "
    "of such a block cannot be dropped"
)


def expect(hf: Mapping[str, Any], **only: Any) -> None:
    """Raise UserError unless every setting of ``only`` has the value given there, or is absent."""
    for key, value in only.items():
        if hf.get(key, value) != value:
            raise UserError(
                f"{key} = {hf[key]!r} in a {hf.get('model_type')} config; this family is known with {value!r} only"
            )


def positive_number(hf: Mapping[str, Any], key: str) -> float:
    """A small number > 0, such as a norm's epsilon. Raises UserError."""
    value = hf.get(key)
    if not isinstance(value, float) or not 0 < value < 1:
        raise UserError(f"{key} is {value!r}, expected a small number > 0")
    return value


def window_of_some_blocks(hf: Mapping[str, Any]) -> int | None:
    """The sliding window of a config in which blocks may differ (``use_sliding_window``, ``max_window_layers``,
    ``layer_types``), where all agree: keys that a query sees, or None. Raises UserError where they do not."""
    layers = hf["num_hidden_layers"]
    first = hf.get("max_window_layers", 28)
    window = hf.get("sliding_window", 4096) if hf.get("use_sliding_window", False) else None
    sliding = [window is not None and i >= first for i in range(layers)]
    if hf.get("layer_types"):
        sliding = [kind == "sliding_attention" for kind in hf["layer_types"]]
    if any(sliding) and not all(sliding):
        raise UserError(
            f"{sum(sliding)} of {layers} blocks of this {hf.get('model_type')} have a sliding window and the others "
            "have none; only one window for all blocks is supported"
        )
    return window if all(sliding) else None
