"""The plan: exact JSON round trip, errors that name the field, what a schedule says, and no torch."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_spd.collective import FULL, NONE
from megatron_spd.errors import PlanError, UserError
from megatron_spd.plan import PLAN_VERSION, RECOVERIES, TIERS, BaseModel, BlockPlan, SPDPlan, branches_of_rank

BASE = BaseModel("f" * 64, "llama", 4, 24, 6, 3, 12)


def plan_with(drops=(), base=BASE, branches=3):
    return SPDPlan.dense(base, branches).with_drops(drops)


# ---- JSON -----------------------------------------------------------------------------------------------------------

JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@st.composite
def plans(draw):
    branches = draw(st.integers(1, 4))
    kv = branches * draw(st.integers(1, 2))
    base = BaseModel(
        draw(st.text(min_size=1, max_size=64)),
        "llama",
        draw(st.integers(1, 4)),
        draw(st.integers(1, 64)),
        kv * draw(st.integers(1, 3)),
        kv,
        branches * draw(st.integers(1, 3)),
    )
    block = st.builds(
        BlockPlan,
        tier=st.sampled_from(TIERS),
        recovery=st.sampled_from(RECOVERIES),
        kv_group_order=st.none() | st.permutations(range(kv)),
        neuron_order=st.none() | st.permutations(range(base.intermediate_size)),
        attention_shift=st.booleans(),
        mlp_shift=st.booleans(),
        attention_norm=st.booleans(),
        mlp_norm=st.booleans(),
    )
    n = base.num_layers
    return SPDPlan(
        base,
        branches,
        draw(
            st.lists(st.sampled_from([FULL, NONE, "int8", "int4/int8:g64"]), min_size=2 * n, max_size=2 * n)
        ),
        draw(st.lists(block, min_size=n, max_size=n)),
        draw(st.dictionaries(st.text(max_size=8), JSON_VALUES, max_size=3)),
    )


@given(plans())
def test_round_trip_is_exact(plan):
    plan.validate()
    text = plan.to_json()
    again = SPDPlan.from_json(text)
    assert again == plan
    assert again.to_json() == text


def test_save_and_load(tmp_path):
    plan = plan_with([0, 3]).with_block(1, kv_group_order=[2, 0, 1], tier="ESB", recovery="hg+b2b")
    plan = plan.with_provenance(tokens=2048, data="text ü", measured={"plain": 27.2})
    plan.save(tmp_path / "plan.json")
    assert SPDPlan.load(tmp_path / "plan.json") == plan
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_a_plan_from_before_branch_norms_has_none():
    plan = plan_with([0]).with_block(1, mlp_shift=True)
    raw = plan.to_dict()
    for block in raw["blocks"]:
        del block["attention_norm"], block["mlp_norm"]
    assert SPDPlan.from_dict(raw) == plan


def test_a_plan_of_version_1_is_read_as_one_of_the_present_version():
    plan = plan_with([0])
    assert SPDPlan.from_dict(plan.to_dict() | {"version": 1}) == plan
    assert plan.version == PLAN_VERSION == 2


def test_the_routing_of_experts_is_written_where_it_is_not_the_usual_one():
    """So that plans of dense models, and what is derived from their text, stay as they were."""
    plan = plan_with([0])
    assert "routing" not in plan.to_dict()
    first = dataclasses.replace(plan, routing="first")
    assert SPDPlan.from_dict(first.to_dict()) == first != plan
    assert first.block_schedule(0).routing == "first"
    # A plan that drops nothing is the dense model, whoever routes.
    assert dataclasses.replace(plan_with(), routing="first").block_schedule(0).is_stock


def test_load_errors_name_the_file(tmp_path):
    with pytest.raises(PlanError, match=r"no plan at .*missing\.json.*megatron-spd plan"):
        SPDPlan.load(tmp_path / "missing.json")
    (tmp_path / "cut.json").write_text(plan_with().to_json()[:-40])
    with pytest.raises(PlanError, match=r"cut\.json is not JSON"):
        SPDPlan.load(tmp_path / "cut.json")


# ---- schema ---------------------------------------------------------------------------------------------------------

#: What is changed in the JSON of a good plan (path, new value) -> the field that the error names.
WRONG = [
    (("version",), 3, "version"),
    (("version",), "1", "version"),
    (("branches",), 0, "branches"),
    (("branches",), True, "branches"),
    (("branches",), 1.0, "branches"),
    (("provenance",), [], "provenance"),
    (("extra",), 1, "extra"),
    (("routing",), "last", "routing"),
    (("sync_points",), [FULL] * 7, "sync_points"),
    (("sync_points",), None, "sync_points"),
    (("sync_points", 5), "lowbit4", "sync_points[5]"),
    (("sync_points", 5), "int9", "sync_points[5]"),
    (("sync_points", 5), "int4:g48", "sync_points[5]"),
    (("sync_points", 5), [], "sync_points[5]"),
    (("blocks",), {}, "blocks"),
    (("blocks",), [], "blocks"),
    (("blocks", 2), None, "blocks[2]"),
    (("blocks", 2, "tier"), "XSB", "blocks[2].tier"),
    (("blocks", 2, "recovery"), None, "blocks[2].recovery"),
    (("blocks", 2, "mlp_shift"), 1, "blocks[2].mlp_shift"),
    (("blocks", 2, "attention_shift"), "yes", "blocks[2].attention_shift"),
    (("blocks", 2, "mlp_norm"), None, "blocks[2].mlp_norm"),
    (("blocks", 2, "attention_norm"), 1, "blocks[2].attention_norm"),
    (("blocks", 2, "colour"), "red", "blocks[2].colour"),
    (("blocks", 3, "kv_group_order"), [0, 1], "blocks[3].kv_group_order"),
    (("blocks", 3, "kv_group_order"), [0, 1, 1], "blocks[3].kv_group_order"),
    (("blocks", 3, "kv_group_order"), [0, 1, "2"], "blocks[3].kv_group_order"),
    (("blocks", 3, "kv_group_order"), [0, True, 2], "blocks[3].kv_group_order"),
    (("blocks", 3, "neuron_order"), 5, "blocks[3].neuron_order"),
    (("base_model",), "llama", "base_model"),
    (("base_model", "fingerprint"), "", "base_model.fingerprint"),
    (("base_model", "model_type"), None, "base_model.model_type"),
    (("base_model", "hidden_size"), "24", "base_model.hidden_size"),
    (("base_model", "num_layers"), 0, "base_model.num_layers"),
    (("base_model", "num_key_value_heads"), 4, "base_model.num_key_value_heads"),
    (("base_model", "vocab"), 1, "base_model.vocab"),
]


@pytest.mark.parametrize(("path", "value", "field"), WRONG, ids=[f"{f}={v!r}" for _, v, f in WRONG])
def test_a_wrong_field_is_named(path, value, field):
    raw = json.loads(plan_with([0]).to_json())
    place = raw
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(PlanError) as caught:
        SPDPlan.from_dict(raw)
    assert f"'{field}'" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "path",
    [("branches",), ("sync_points",), ("blocks",), ("base_model",), ("base_model", "intermediate_size")],
)
def test_a_missing_field_is_named(path):
    raw = json.loads(plan_with([0]).to_json())
    place = raw
    for key in path[:-1]:
        place = place[key]
    del place[path[-1]]
    with pytest.raises(PlanError, match=f"'{'.'.join(path)}': missing"):
        SPDPlan.from_dict(raw)


@pytest.mark.parametrize("raw", [None, [], "plan", 3])
def test_not_an_object(raw):
    with pytest.raises(PlanError, match="expected an object"):
        SPDPlan.from_dict(raw)


def test_a_plan_of_another_version_says_what_to_do():
    raw = plan_with().to_dict() | {"version": PLAN_VERSION + 1}
    with pytest.raises(
        PlanError, match=rf"'version': got {PLAN_VERSION + 1}, expected 1 or {PLAN_VERSION} .*remake"
    ):
        SPDPlan.from_dict(raw)
    del raw["version"]
    with pytest.raises(PlanError, match="'version'"):
        SPDPlan.from_dict(raw)


@pytest.mark.parametrize(
    ("branches", "words"), [(2, "3 key/value groups"), (4, "6 attention heads"), (6, "3 key/value groups")]
)
def test_branches_that_do_not_fit_the_model(branches, words):
    with pytest.raises(UserError, match=rf"G = {branches} branches do not divide .*{words}.*\[1, 3\]"):
        SPDPlan.dense(BASE, branches)


def test_branches_that_do_not_divide_the_neurons():
    with pytest.raises(UserError, match=r"10 MLP neurons; G may be one of \[1\]"):
        SPDPlan.dense(dataclasses.replace(BASE, intermediate_size=10), 3)


# ---- schedules and units --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("drops", "units"),
    [
        ([], []),
        ([2], [range(1, 2)]),
        ([0, 2, 4, 6], [range(0, 1), range(1, 2), range(2, 3), range(3, 4)]),
        ([1], [range(0, 2)]),
        ([1, 3], [range(0, 3)]),
        ([1, 5], [range(0, 2), range(2, 4)]),
        ([0, 3, 6], [range(0, 1), range(1, 3), range(3, 4)]),
        (range(8), [range(0, 4)]),
    ],
)
def test_units(drops, units):
    assert plan_with(drops).units() == units


@given(st.sets(st.integers(0, 15)))
def test_units_hold_every_dropped_point_and_split_only_at_kept_ones(drops):
    base = dataclasses.replace(BASE, num_layers=8)
    plan = plan_with(drops, base)
    units = plan.units()
    in_units = [i for unit in units for i in unit]
    assert in_units == sorted(set(in_units))
    touched = {p // 2 for p in plan.dropped} | {p // 2 + 1 for p in plan.dropped if p % 2}
    assert set(in_units) == touched
    ends = {unit.stop - 1 for unit in units}
    assert {i for i in in_units if 2 * i + 1 in plan.dropped} == set(in_units) - ends


def test_block_schedule():
    plan = plan_with([0, 3]).with_block(2, mlp_shift=True)
    first, second, third, last = (plan.block_schedule(i) for i in range(4))
    assert (first.pending, first.drop_attention, first.drop_mlp) == (False, True, False)
    assert (second.pending, second.drop_attention, second.drop_mlp) == (False, False, True)
    assert (third.pending, third.drop_attention, third.drop_mlp) == (True, False, False)
    assert (third.attention_shift, third.mlp_shift) == (False, True)
    assert [s.is_stock for s in (first, second, third, last)] == [False, False, False, True]
    assert first.branches == 3
    for flag in ("attention_shift", "mlp_shift", "attention_norm", "mlp_norm"):
        schedule = plan_with().with_block(0, **{flag: True}).block_schedule(0)
        assert getattr(schedule, flag)
        assert not schedule.is_stock


def test_collectives_of_kept_points():
    plan = plan_with([0, 3]).with_collectives("int8", "int4/int8:g64")
    mlp = "int4/int8:g64"
    assert plan.sync_points == ["none", mlp, "int8", "none", "int8", mlp, "int8", mlp]
    assert (plan.dropped, list(plan.low_bit)) == ([0, 3], [1, 2, 4, 5, 6, 7])
    schedules = [plan.block_schedule(i) for i in range(4)]
    assert [s.attention_collective for s in schedules] == ["full", "int8", "int8", "int8"]
    assert [s.mlp_collective for s in schedules] == [mlp, "full", mlp, mlp]
    assert not any(s.is_stock for s in schedules)
    assert plan.collectives_per_forward() == 6
    # Dropping other points leaves the collectives of the rest alone; a point that is kept again has a full one.
    assert plan.with_drops([2]).sync_points == ["full", mlp, "none", "full", "int8", mlp, "int8", mlp]
    assert plan.with_collectives() == plan_with([0, 3])
    assert plan.with_collectives(mlp="int8").sync_points[:3] == ["none", "int8", "full"]
    with pytest.raises(UserError, match="'none': expected a low-bit format"):
        plan.with_collectives("none")


def test_a_low_bit_format_is_written_in_one_way():
    assert plan_with().with_collectives("int8:g128", "int8/int8").low_bit == dict.fromkeys(range(8), "int8")


def test_low_bit_points_alone_make_no_unit():
    assert plan_with([2]).with_collectives("int4", "int4").units() == [range(1, 2)]


def test_the_last_point_is_synced_at_the_end_of_the_model():
    plan = plan_with([6, 7])
    assert plan.dropped == [6]
    assert not plan.block_schedule(3).drop_mlp
    assert plan.collectives_per_forward() == 7
    assert plan_with().collectives_per_forward() == 8


@pytest.mark.parametrize("point", [-1, 8])
def test_a_drop_outside_the_model(point):
    with pytest.raises(UserError, match=rf"sync point {point} is not in 0\.\.7"):
        plan_with([point])


def test_copies_leave_the_original_alone():
    plan = plan_with([0])
    changed = plan.with_drops([2]).with_block(0, tier="SB").with_provenance(seed=1)
    assert (plan.dropped, plan.blocks[0].tier, plan.provenance) == ([0], "", {})
    assert (changed.dropped, changed.blocks[0].tier, changed.provenance) == ([2], "SB", {"seed": 1})
    assert changed.blocks[1].tier == ""


# ---- where it runs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 3, 6])
def test_ranks_that_divide_the_branches(ranks):
    base = dataclasses.replace(BASE, num_key_value_heads=6)
    plan_with(base=base, branches=6).check_ranks(ranks)


@pytest.mark.parametrize("ranks", [0, -3, 4, 5, 12])
def test_ranks_that_fit_no_case(ranks):
    base = dataclasses.replace(BASE, num_key_value_heads=6)
    with pytest.raises(
        UserError, match=rf"M = {ranks} ranks .* G = 6 branches; M may be one of \[1, 2, 3, 6\]"
    ):
        plan_with(base=base, branches=6).check_ranks(ranks)


def test_branches_that_divide_the_ranks():
    base = dataclasses.replace(BASE, num_attention_heads=8, num_key_value_heads=8, intermediate_size=24)
    plan = plan_with(base=base, branches=2)
    for ranks in (1, 2, 4, 8):
        plan.check_ranks(ranks)
    # 6 divides neither heads nor G; 16 is more than there are key/value groups.
    for ranks in (3, 6, 16):
        with pytest.raises(
            UserError, match=r"may be one of \[1, 2, 4, 8\] .* 8 heads, 8 key/value groups and 24"
        ):
            plan.check_ranks(ranks)


@pytest.mark.parametrize(
    ("branches", "ranks", "wanted"),
    [
        (6, 2, [range(0, 3), range(3, 6)]),
        (2, 2, [range(1), range(1, 2)]),
        (2, 4, [*2 * [range(1)], *2 * [range(1, 2)]]),
    ],
)
def test_branches_of_a_rank(branches, ranks, wanted):
    slices = [branches_of_rank(branches, rank, ranks) for rank in range(ranks)]
    assert [range(s.start, s.stop) for s in slices] == wanted


def test_a_plan_of_another_model():
    plan_with().check_model("f" * 64, "DIR")
    with pytest.raises(PlanError, match="fingerprint ffffffffffff, but DIR has eeeeeeeeeeee"):
        plan_with().check_model("e" * 64, "DIR")


def test_importing_the_plan_imports_no_torch():
    code = "import sys, megatron_spd.plan; print([m for m in ('torch', 'numpy', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
