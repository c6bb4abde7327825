"""SPDPlan: everything that makes an SPD model what it is.

The plan is the identity of an SPD model (which sync points are dropped, for how many branches, which head and neuron
sits in which branch). It is stored inside every checkpoint, and everything that loads a checkpoint checks it.

Pure Python on purpose: a plan can be read, made and checked without torch.

Words: ``L`` blocks, ``2L`` sync points; point ``2i`` follows the attention of block ``i``, point ``2i + 1`` its MLP.
``G`` branches are a property of the checkpoint, ``M`` ranks of the launch.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

from megatron_spd.collective import EXPECTED, FULL, NONE, CollectiveFormat, low_bit_format
from megatron_spd.errors import PlanError, UserError
from megatron_spd.files import write_text_atomic

#: Version 2 added low-bit collectives; a plan of version 1 is read as it is.
PLAN_VERSION = 2
READABLE_VERSIONS = (1, 2)

#: Tiers of section 2 of the paper; "" for a block in which nothing is dropped.
TIERS = ("", "ISB", "SB", "ESB")
#: How a block was recovered; "" for a block in which nothing is dropped.
RECOVERIES = ("", "zs", "b2b", "hg+b2b", "grouped", "grouped+b2b")

#: Whose view of the hidden state decides on a token's experts: each branch's own, or that of the first branch for all.
Routing = Literal["branch", "first"]
ROUTINGS: tuple[Routing, ...] = ("branch", "first")

#: Fields of a block's plan that say which vectors by branch it has.
BRANCH_FLAGS = ("attention_shift", "mlp_shift", "attention_norm", "mlp_norm")


def _fail(where: str, given: Any, expected: str) -> NoReturn:
    raise PlanError(f"plan field '{where}': got {_short(given)}, expected {expected}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _take(raw: Any, cls: type, where: str) -> dict[str, Any]:
    """The JSON object ``raw`` as keyword arguments of dataclass ``cls``; names the first missing or unknown field."""
    if not isinstance(raw, dict):
        _fail(where or "plan", raw, "an object")
    names = {f.name for f in dataclasses.fields(cls)}
    prefix = f"{where}." if where else ""
    for key in raw:
        if key not in names:
            _fail(f"{prefix}{key}", raw[key], f"one of the fields {sorted(names)}")
    for f in dataclasses.fields(cls):
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and f.name not in raw:
            raise PlanError(f"plan field '{prefix}{f.name}': missing")
    return dict(raw)


def _check_int(value: Any, where: str, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        _fail(where, value, f"a whole number >= {least}")


def _check_permutation(value: Any, where: str, n: int) -> None:
    if value is None:
        return
    if not isinstance(value, list) or len(value) != n or sorted(map(_as_index, value)) != list(range(n)):
        _fail(where, value, f"null or a permutation of 0..{n - 1}")


def _check_collective(value: Any, where: str) -> None:
    try:
        low_bit_format(value if isinstance(value, str) else "")
    except UserError:
        _fail(where, value, f"{FULL!r}, {NONE!r} or {EXPECTED}")


def _as_index(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else -1


def branches_of_rank(branches: int, rank: int, ranks: int) -> slice:
    """Which of ``branches`` = G the ``rank``-th of ``ranks`` = M computes: G / M of them, or, for M > G, (a part of)
    one."""
    first = rank * branches // ranks
    return slice(first, first + max(1, branches // ranks))


@dataclass(frozen=True)
class BaseModel:
    """The dense model that a plan was made for.

    ``fingerprint`` is the hash that :meth:`megatron_spd.checkpoint.hf.CheckpointReader.fingerprint` takes of
    its weights and config.
    """

    fingerprint: str
    model_type: str
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int

    def validate(self) -> None:
        for name in ("fingerprint", "model_type"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                _fail(f"base_model.{name}", getattr(self, name), "a non-empty string")
        for f in dataclasses.fields(self):
            if f.name not in ("fingerprint", "model_type"):
                _check_int(getattr(self, f.name), f"base_model.{f.name}", 1)
        if self.num_attention_heads % self.num_key_value_heads:
            _fail(
                "base_model.num_key_value_heads",
                self.num_key_value_heads,
                f"a divisor of num_attention_heads = {self.num_attention_heads}",
            )

    def divides(self, parts: int) -> bool:
        """Whether heads, KV groups and neurons divide into ``parts`` equal parts."""
        sizes = (self.num_attention_heads, self.num_key_value_heads, self.intermediate_size)
        return not any(size % parts for size in sizes)

    def check_branches(self, branches: int) -> None:
        """Raise UserError unless heads, KV groups and neurons divide into ``branches`` equal parts."""
        for what, n in (
            ("attention heads", self.num_attention_heads),
            ("key/value groups", self.num_key_value_heads),
            ("MLP neurons", self.intermediate_size),
        ):
            if branches < 1 or n % branches:
                fits = [g for g in range(1, self.num_key_value_heads + 1) if self.divides(g)]
                raise UserError(
                    f"G = {branches} branches do not divide the model's {n} {what}; G may be one of {fits}"
                )


@dataclass(frozen=True)
class BlockPlan:
    """What was done to one block beside dropping its sync points.

    ``kv_group_order[j]`` is the original key/value group (with its query heads) now in place ``j``; ``neuron_order``
    likewise for MLP neurons; ``None`` means the original order. Branch ``g`` holds the ``g``-th of ``G`` equal
    contiguous parts of either. ``attention_shift`` / ``mlp_shift`` say whether the block has an ``spd_shift`` at the
    input of that sublayer, ``attention_norm`` / ``mlp_norm`` whether that sublayer's norm has a weight and a bias for
    every branch (``spd_norm_weight``, ``spd_norm_bias``).
    """

    tier: str = ""
    recovery: str = ""
    kv_group_order: list[int] | None = None
    neuron_order: list[int] | None = None
    attention_shift: bool = False
    mlp_shift: bool = False
    attention_norm: bool = False
    mlp_norm: bool = False

    def validate(self, where: str, base: BaseModel) -> None:
        if self.tier not in TIERS:
            _fail(f"{where}.tier", self.tier, f"one of {list(TIERS)}")
        if self.recovery not in RECOVERIES:
            _fail(f"{where}.recovery", self.recovery, f"one of {list(RECOVERIES)}")
        _check_permutation(self.kv_group_order, f"{where}.kv_group_order", base.num_key_value_heads)
        _check_permutation(self.neuron_order, f"{where}.neuron_order", base.intermediate_size)
        for name in BRANCH_FLAGS:
            if not isinstance(getattr(self, name), bool):
                _fail(f"{where}.{name}", getattr(self, name), "true or false")


@dataclass(frozen=True)
class BlockSchedule:
    """The sync-point rule as one block sees it.

    ``pending``: branch sums enter the block unsynced (the MLP point before it is dropped).
    ``drop_attention`` / ``drop_mlp``: the block's own points. ``branches``: G.
    ``attention_shift`` / ``mlp_shift``: there is a shift at that sublayer's input. ``attention_norm`` / ``mlp_norm``:
    that sublayer's norm has a weight and a bias for every branch. ``attention_collective`` / ``mlp_collective``: what
    runs at a kept point, "full" or a low-bit format ("full" for a dropped one). ``routing``: of a block with experts.
    """

    branches: int
    pending: bool = False
    drop_attention: bool = False
    drop_mlp: bool = False
    attention_shift: bool = False
    mlp_shift: bool = False
    attention_norm: bool = False
    mlp_norm: bool = False
    attention_collective: str = FULL
    mlp_collective: str = FULL
    routing: Routing = "branch"

    @property
    def mlp_inputs_differ(self) -> bool:
        """Whether branches see different inputs of the MLP."""
        return self.drop_attention or self.mlp_shift or self.mlp_norm

    @property
    def is_stock(self) -> bool:
        """Nothing dropped, pending, low-bit or different for each branch: the stock tensor-parallel block computes
        it."""
        return self == BlockSchedule(self.branches, routing=self.routing)


@dataclass(frozen=True)
class SPDPlan:
    """A whole plan. ``sync_points`` has 2L entries: "none" (the point is dropped), "full", or a low-bit format (see
    ``collective.py``); ``blocks`` has L.

    ``provenance`` is free JSON: data, tokens, seed, package versions, measured figures. ``routing``: in a model with
    experts, whether each branch chooses a token's experts by its own view of the hidden state ("branch"), or the first
    branch chooses for all ("first"). Plans from before there was a choice lack the field, and so do those that do not
    use it.
    """

    base_model: BaseModel
    branches: int
    sync_points: list[str]
    blocks: list[BlockPlan]
    provenance: dict[str, Any] = field(default_factory=dict)
    version: int = PLAN_VERSION
    routing: Routing = "branch"

    # ---- making one -------------------------------------------------------------------------------------------

    @classmethod
    def dense(cls, base: BaseModel, branches: int) -> SPDPlan:
        """The plan that drops nothing."""
        plan = cls(base, branches, [FULL] * (2 * base.num_layers), [BlockPlan()] * base.num_layers)
        plan.validate()
        return plan

    def with_drops(self, points: Sequence[int]) -> SPDPlan:
        """A copy in which exactly ``points`` (0..2L-1) are dropped; kept points keep their collective."""
        for p in points:
            if not 0 <= p < len(self.sync_points):
                raise UserError(f"sync point {p} is not in 0..{len(self.sync_points) - 1}")
        dropped = set(points)
        kept = [FULL if c == NONE else c for c in self.sync_points]
        return dataclasses.replace(
            self, sync_points=[NONE if p in dropped else c for p, c in enumerate(kept)]
        )

    def with_collectives(self, attention: str = FULL, mlp: str = FULL) -> SPDPlan:
        """A copy in which every kept point after an attention or an MLP runs that collective: "full" or low-bit."""
        names = [c if c == FULL else str(CollectiveFormat.parse(c)) for c in (attention, mlp)]
        dropped = set(self.dropped)
        return dataclasses.replace(
            self,
            sync_points=[NONE if p in dropped else names[p % 2] for p in range(len(self.sync_points))],
        )

    def synced_behind(self, blocks: Collection[int]) -> SPDPlan:
        """A copy in which the MLP points of ``blocks`` are not dropped; numbers that are no block's are passed over."""
        behind = {p for p in self.dropped if p % 2 and p // 2 in blocks}
        return dataclasses.replace(
            self, sync_points=[FULL if p in behind else c for p, c in enumerate(self.sync_points)]
        )

    def with_block(self, block: int, **changes: Any) -> SPDPlan:
        """A copy with ``changes`` (fields of BlockPlan) made to one block."""
        blocks = list(self.blocks)
        blocks[block] = dataclasses.replace(blocks[block], **changes)
        return dataclasses.replace(self, blocks=blocks)

    def with_provenance(self, **facts: Any) -> SPDPlan:
        """A copy with ``facts`` added to the provenance."""
        return dataclasses.replace(self, provenance={**self.provenance, **facts})

    # ---- what it says -----------------------------------------------------------------------------------------

    @property
    def num_layers(self) -> int:
        return self.base_model.num_layers

    @property
    def dropped(self) -> list[int]:
        """The dropped points in ascending order. The last point is never among them: what is pending there is
        synced at the end of the model."""
        return [p for p, c in enumerate(self.sync_points[:-1]) if c == NONE]

    @property
    def low_bit(self) -> dict[int, str]:
        """The points with a low-bit all-reduce, ascending, and their formats."""
        return {p: c for p, c in enumerate(self.sync_points) if c not in (FULL, NONE)}

    def block_schedule(self, block: int) -> BlockSchedule:
        """The rule as block ``block`` (0..L-1) sees it."""
        dropped, low_bit = set(self.dropped), self.low_bit
        extra = self.blocks[block]
        return BlockSchedule(
            branches=self.branches,
            pending=2 * block - 1 in dropped,
            drop_attention=2 * block in dropped,
            drop_mlp=2 * block + 1 in dropped,
            attention_shift=extra.attention_shift,
            mlp_shift=extra.mlp_shift,
            attention_norm=extra.attention_norm,
            mlp_norm=extra.mlp_norm,
            attention_collective=low_bit.get(2 * block, FULL),
            mlp_collective=low_bit.get(2 * block + 1, FULL),
            routing=self.routing,
        )

    def units(self) -> list[range]:
        """The runs of blocks that are distilled together, in order: blocks joined by dropped MLP points, or single
        blocks whose attention point is dropped. Blocks in which nothing is dropped are in no unit."""
        dropped = set(self.dropped)
        units, start = [], 0
        for i in range(self.num_layers):
            if 2 * i + 1 in dropped:
                continue
            if any(p in dropped for p in range(2 * start, 2 * i + 1)):
                units.append(range(start, i + 1))
            start = i + 1
        return units

    def points_in(self, unit: range) -> tuple[int, ...]:
        """The dropped points of the blocks ``unit``, ascending."""
        return tuple(p for p in self.dropped if p // 2 in unit)

    def collectives_per_forward(self) -> int:
        """Forward all-reduces of the blocks (embedding and output layer not counted)."""
        return len(self.sync_points) - len(self.dropped)

    def check_ranks(self, ranks: int) -> None:
        """Raise UserError unless ``ranks`` is a case of method section 8: M divides G, or G divides M and the heads and
        neurons of a branch divide by its M / G ranks."""
        if not self._fits(ranks):
            base = self.base_model
            most = max(self.branches, base.num_key_value_heads)
            raise UserError(
                f"M = {ranks} ranks cannot run a plan of G = {self.branches} branches; M may be one of "
                f"{[m for m in range(1, most + 1) if self._fits(m)]} (divisors of G, and its multiples that divide the "
                f"{base.num_attention_heads} heads, {base.num_key_value_heads} key/value groups and "
                f"{base.intermediate_size} neurons)"
            )

    def _fits(self, ranks: int) -> bool:
        if ranks < 1:
            return False
        if self.branches % ranks == 0:
            return True
        return ranks % self.branches == 0 and self.base_model.divides(ranks)

    def check_model(self, fingerprint: str, where: str) -> None:
        """Raise PlanError unless the model at ``where`` is the one this plan was made for."""
        if fingerprint != self.base_model.fingerprint:
            raise PlanError(
                f"the plan was made for the model with fingerprint {self.base_model.fingerprint[:12]}, but {where} has "
                f"{fingerprint[:12]}; make a plan for this model with `megatron-spd plan`"
            )

    # ---- checks and JSON --------------------------------------------------------------------------------------

    def validate(self) -> None:
        """Raise PlanError that names the first wrong field, or UserError if G does not fit the model."""
        if self.version != PLAN_VERSION:
            _fail("version", self.version, f"{PLAN_VERSION}")
        self.base_model.validate()
        _check_int(self.branches, "branches", 1)
        self.base_model.check_branches(self.branches)
        n = 2 * self.num_layers
        if not isinstance(self.sync_points, list) or len(self.sync_points) != n:
            _fail("sync_points", self.sync_points, f"a list of {n} (two for each block)")
        for p, c in enumerate(self.sync_points):
            _check_collective(c, f"sync_points[{p}]")
        if not isinstance(self.blocks, list) or len(self.blocks) != self.num_layers:
            _fail("blocks", self.blocks, f"a list of {self.num_layers}")
        for i, block in enumerate(self.blocks):
            block.validate(f"blocks[{i}]", self.base_model)
        if not isinstance(self.provenance, dict):
            _fail("provenance", self.provenance, "an object")
        if self.routing not in ROUTINGS:
            _fail("routing", self.routing, f"one of {list(ROUTINGS)}")

    def to_dict(self) -> dict[str, Any]:
        fields = dataclasses.asdict(self)
        return fields if self.routing != "branch" else {k: v for k, v in fields.items() if k != "routing"}

    @classmethod
    def from_dict(cls, raw: Any) -> SPDPlan:
        """The plan in a parsed JSON object, in the present version. Raises PlanError that names the first wrong
        field."""
        version = raw.get("version") if isinstance(raw, dict) else PLAN_VERSION
        if type(version) is not int or version not in READABLE_VERSIONS:
            known = " or ".join(map(str, READABLE_VERSIONS))
            _fail("version", version, f"{known} (this package reads no other; remake the plan)")
        fields = _take(raw, cls, "") | {"version": PLAN_VERSION}
        fields["base_model"] = BaseModel(**_take(fields["base_model"], BaseModel, "base_model"))
        if not isinstance(fields["blocks"], list):
            _fail("blocks", fields["blocks"], "a list")
        fields["blocks"] = [
            BlockPlan(**_take(b, BlockPlan, f"blocks[{i}]")) for i, b in enumerate(fields["blocks"])
        ]
        plan = cls(**fields)
        plan.validate()
        return plan

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str = "the plan") -> SPDPlan:
        try:
            raw = json.loads(text)
        except json.JSONDecodeError as error:
            raise PlanError(f"{where} is not JSON: {error}") from None
        return cls.from_dict(raw)

    def save(self, path: str | Path) -> None:
        """Write the plan atomically."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> SPDPlan:
        path = Path(path)
        if not path.is_file():
            raise PlanError(f"no plan at {path}; make one with `megatron-spd plan`")
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise PlanError(f"{path} is not a text file; make a plan with `megatron-spd plan`") from None
        return cls.from_json(text, str(path))
