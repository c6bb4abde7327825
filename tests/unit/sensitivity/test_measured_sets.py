"""Measured sets survive a restart; files of another search and broken ones are refused."""

from __future__ import annotations

import math

import pytest

from megatron_spd.errors import UserError
from megatron_spd.sensitivity.measured_sets import MeasuredCollectives, MeasuredSets


def test_sets_are_read_back(tmp_path):
    path = tmp_path / "sets.json"
    sets = MeasuredSets(path, "model a")
    sets.add((1, 4), 12.3456789012345)
    sets.add((), 11.0)
    sets.add((0, 1, 2), math.inf)
    again = MeasuredSets(path, "model a")
    assert len(again) == 3
    assert again.get((1, 4)) == 12.3456789012345
    assert again.get(()) == 11.0
    assert again.get((0, 1, 2)) == math.inf
    assert again.get((1,)) is None
    assert [p.name for p in tmp_path.iterdir()] == ["sets.json"]


def test_no_file_keeps_them_in_memory():
    sets = MeasuredSets(None, "")
    sets.add((3,), 2.0)
    assert sets.get((3,)) == 2.0


def test_another_search_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "sets.json"
    MeasuredSets(path, "model a").add((1,), 2.0)
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"sets\.json holds .* another search .*remove it"):
        MeasuredSets(path, "model b")
    assert path.read_bytes() == before


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"identity": "a", "sets": [{"points": 3}]}'])
def test_a_broken_file_is_named(tmp_path, text):
    path = tmp_path / "sets.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"sets\.json .*remove it") as caught:
        MeasuredSets(path, "a")
    assert "\n" not in str(caught.value)


def test_collectives_are_read_back(tmp_path):
    path = tmp_path / "sets.json"
    sets = MeasuredCollectives(path, "model a")
    sets.add(("none", "int8"), (12.3456789012345, 12.0))
    sets.add(("full", "full"), (11.0, math.inf))
    again = MeasuredCollectives(path, "model a")
    assert again.get(("none", "int8")) == (12.3456789012345, 12.0)
    assert again.get(("full", "full")) == (11.0, math.inf)
    assert again.get(("none", "int4")) is None
    with pytest.raises(UserError, match=r"sets\.json holds .* another search .*remove it"):
        MeasuredCollectives(path, "model b")


def test_the_sets_of_one_kind_of_search_are_no_sets_of_another(tmp_path):
    path = tmp_path / "sets.json"
    MeasuredSets(path, "a").add((1,), 2.0)
    with pytest.raises(UserError, match=r"sets\.json .*cannot be read .*remove it"):
        MeasuredCollectives(path, "a")
