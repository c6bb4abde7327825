"""Config of a Llama whose tensor-parallel sync points are partly dropped (Sync-Point Drop, "SPD").

This file is shipped inside exported model folders: it needs transformers and nothing else.
"""

from __future__ import annotations

import re
from typing import Any

from transformers import LlamaConfig

#: The versions of the plan format that this file understands.
PLAN_VERSIONS = (1, 2)
#: A sync point that is synced: by a full all-reduce, or by a low-bit one such as "int4/int8:g64".
_SYNCED = re.compile(r"full|int[2-8](/int[2-8])?(:g\d+)?")


class SPDLlamaConfig(LlamaConfig):
    """A Llama config plus ``spd_plan``, the plan of the model as megatron_spd wrote it.

    What is read of the plan: ``version``; ``branches`` (G); ``sync_points``, 2L times "none" (dropped), "full" or
    a low-bit format (point 2i follows the attention of block i, point 2i + 1 its MLP); ``blocks[i].attention_shift``
    and ``.mlp_shift``, ``.attention_norm`` and ``.mlp_norm`` (false where a plan lacks them). Without a plan nothing is
    dropped. Raises ValueError for a plan of another version or one that does not fit the model.

    A low-bit format says how ranks exchange their sums at a synced point. On one device nothing is exchanged, and the
    point is computed exactly, as a full one.
    """

    model_type = "spd_llama"
    # The plans of a dense Llama would shard and place weights by a formula that this model does not follow.
    base_model_tp_plan = None  # type: ignore[assignment]
    base_model_pp_plan = None  # type: ignore[assignment]

    def __init__(self, spd_plan: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.spd_plan = spd_plan
        if spd_plan is not None:
            self._check_plan(spd_plan)

    def _check_plan(self, plan: dict[str, Any]) -> None:
        if plan.get("version") not in PLAN_VERSIONS:
            raise ValueError(
                f"spd_plan has version {plan.get('version')!r}, this code reads {PLAN_VERSIONS}; "
                "use the code that was exported with the model"
            )
        layers, points, blocks = self.num_hidden_layers, plan["sync_points"], plan["blocks"]
        if len(points) != 2 * layers or len(blocks) != layers:
            raise ValueError(
                f"spd_plan has {len(points)} sync points and {len(blocks)} blocks; a model of {layers} blocks has "
                f"{2 * layers} and {layers}"
            )
        unknown = sorted({p for p in points if p != "none" and not _SYNCED.fullmatch(p)})
        if unknown:
            raise ValueError(
                f"spd_plan has sync points {unknown}; this code knows 'full', 'none' and formats such as 'int4:g64'"
            )
        for what, n in (("key/value groups", self.num_key_value_heads), ("neurons", self.intermediate_size)):
            if n % plan["branches"]:
                raise ValueError(f"spd_plan has {plan['branches']} branches, which do not divide {n} {what}")

    @property
    def branches(self) -> int:
        """G, the number of branches; 1 without a plan."""
        return self.spd_plan["branches"] if self.spd_plan is not None else 1

    def is_dropped(self, point: int) -> bool:
        """Whether sync point ``point`` is dropped. What is pending at the last point is synced there in any case."""
        last = 2 * self.num_hidden_layers - 1
        return (
            self.spd_plan is not None and 0 <= point < last and self.spd_plan["sync_points"][point] == "none"
        )

    def has_shift(self, layer: int, sublayer: str) -> bool:
        """Whether block ``layer`` has a shift at the input of ``sublayer`` ("attention" or "mlp")."""
        return self._has(layer, f"{sublayer}_shift")

    def has_norm(self, layer: int, sublayer: str) -> bool:
        """Whether the norm in front of ``sublayer`` of block ``layer`` has a weight and a bias for every branch."""
        return self._has(layer, f"{sublayer}_norm")

    def _has(self, layer: int, flag: str) -> bool:
        return self.spd_plan is not None and bool(self.spd_plan["blocks"][layer].get(flag, False))

    def is_plain(self, layer: int) -> bool:
        """Whether block ``layer`` is the dense Llama's: nothing dropped, pending or different for each branch."""
        dropped = any(self.is_dropped(point) for point in (2 * layer - 1, 2 * layer, 2 * layer + 1))
        extras = (f"{s}_{what}" for s in ("attention", "mlp") for what in ("shift", "norm"))
        return not dropped and not any(self._has(layer, flag) for flag in extras)


__all__ = ["SPDLlamaConfig"]
