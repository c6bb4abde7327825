"""What family files share in reading a ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_spd.errors import UserError
from megatron_spd.models.family import Experts

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


def experts_of(
    hf: Mapping[str, Any], count_key: str, count: int, chosen: int, renormalised: bool = True
) -> Experts:
    """The experts of a config, ``count`` and ``chosen`` where it does not say. Raises UserError for numbers that do not
    fit, and where the model is to be trained with a loss of its routers."""
    if hf.get("output_router_logits"):
        raise UserError(
            "output_router_logits = True asks for a loss of the routers, which is not supported; set it to false"
        )
    total, used = hf.get(count_key, count), hf.get("num_experts_per_tok", chosen)
    if type(total) is not int or type(used) is not int or not 1 <= used <= total:
        raise UserError(
            f"num_experts_per_tok is {used!r} with {count_key} = {total!r}; expected 1 to as many"
        )
    return Experts(total, used, renormalised)


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
