"""Config of a model whose tensor-parallel sync points are partly dropped (Sync-Point Drop, "SPD").

This file is shipped inside exported model folders: it needs transformers and nothing else. ``SPD<Family>Config`` is
made here of transformers' ``<Family>Config`` when it is asked for: ``SPDLlamaConfig``, ``SPDQwen2Config``, ...
"""

from __future__ import annotations

import re
from typing import Any

import transformers
from transformers import PreTrainedConfig

#: The versions of the plan format that this file understands.
PLAN_VERSIONS = (1, 2)
#: A sync point that is synced: by a full all-reduce, or by a low-bit one such as "int4/int8:g64".
_SYNCED = re.compile(r"full|int[2-8](/int[2-8])?(:g\d+)?")


class SPDConfig:
    """Mixed in front of a family's config: ``spd_plan``, the plan of the model as megatron_spd wrote it, and
    ``spd_stored_names``, the family's names for parts of a block that it calls otherwise than Llama does.

    What is read of the plan: ``version``; ``branches`` (G); ``sync_points``, 2L times "none" (dropped), "full" or
    a low-bit format (point 2i follows the attention of block i, point 2i + 1 its MLP); ``blocks[i].attention_shift``
    and ``.mlp_shift``, ``.attention_norm`` and ``.mlp_norm`` (false where a plan lacks them); ``routing``: "branch"
    (every branch chooses experts by its own input; also where a plan lacks it) or "first" (the first branch chooses
    for all). Without a plan nothing is dropped. Raises ValueError for a plan of another version or one that does not
    fit the model.

    A low-bit format says how ranks exchange their sums at a synced point. On one device nothing is exchanged, and the
    point is computed exactly, as a full one.
    """

    # The plans of the dense model would shard and place weights by a formula that this model does not follow.
    base_model_tp_plan = None
    base_model_pp_plan = None

    spd_plan: dict[str, Any] | None
    spd_stored_names: dict[str, str]

    def use_plan(self, plan: dict[str, Any] | None, stored_names: dict[str, str] | None) -> None:
        """Keep and check what an export's config has beside the family's own."""
        self.spd_plan = plan
        self.spd_stored_names = stored_names or {}
        if plan is not None:
            self._check_plan(plan)

    def _check_plan(self, plan: dict[str, Any]) -> None:
        config: Any = self
        if plan.get("version") not in PLAN_VERSIONS:
            raise ValueError(
                f"spd_plan has version {plan.get('version')!r}, this code reads {PLAN_VERSIONS}; "
                "use the code that was exported with the model"
            )
        layers, points, blocks = config.num_hidden_layers, plan["sync_points"], plan["blocks"]
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
        if plan.get("routing", "branch") not in ("branch", "first"):
            raise ValueError(
                f"spd_plan has routing {plan['routing']!r}; this code knows 'branch' and 'first'"
            )
        groups = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        names = ("moe_intermediate_size", "intermediate_size", "ffn_dim")
        neurons = next(n for n in (getattr(config, name, None) for name in names) if n)
        for what, n in (("key/value groups", groups), ("neurons", neurons)):
            if n % plan["branches"]:
                raise ValueError(f"spd_plan has {plan['branches']} branches, which do not divide {n} {what}")

    @property
    def branches(self) -> int:
        """G, the number of branches; 1 without a plan."""
        return self.spd_plan["branches"] if self.spd_plan is not None else 1

    @property
    def one_router(self) -> bool:
        """Whether the first branch's choice of experts is everyone's."""
        return self.spd_plan is not None and self.spd_plan.get("routing") == "first"

    def stored_name(self, name: str) -> str:
        """What this family calls the part of a block that Llama calls ``name``."""
        return self.spd_stored_names.get(name, name)

    def is_dropped(self, point: int) -> bool:
        """Whether sync point ``point`` is dropped. What is pending at the last point is synced there in any case."""
        plan = self.spd_plan
        return (
            plan is not None
            and 0 <= point < len(plan["sync_points"]) - 1
            and plan["sync_points"][point] == "none"
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
        """Whether block ``layer`` is the dense model's: nothing dropped, pending or different for each branch."""
        dropped = any(self.is_dropped(point) for point in (2 * layer - 1, 2 * layer, 2 * layer + 1))
        extras = (f"{s}_{what}" for s in ("attention", "mlp") for what in ("shift", "norm"))
        return not dropped and not any(self._has(layer, flag) for flag in extras)


def config_class(name: str, dense: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """The class ``name`` for exports of models whose config is a ``dense``; every call gives the same."""

    def init(
        self: Any,
        spd_plan: dict[str, Any] | None = None,
        spd_stored_names: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        dense.__init__(self, **kwargs)
        self.use_plan(spd_plan, spd_stored_names)

    if name not in _made:
        body = {
            "__module__": __name__,
            "__doc__": f"{dense.__name__} with ``spd_plan`` (see SPDConfig).",
            "__init__": init,
            "model_type": f"spd_{dense.model_type}",
        }
        _made[name] = type(name, (SPDConfig, dense), body)
    return _made[name]


_made: dict[str, type[PreTrainedConfig]] = {}


def __getattr__(name: str) -> type[PreTrainedConfig]:
    dense = getattr(transformers, name.removeprefix("SPD"), None)
    if not (name.startswith("SPD") and isinstance(dense, type) and issubclass(dense, PreTrainedConfig)):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return config_class(name, dense)
