"""The grammar of low-bit formats, and the bytes that they stand for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_spd.collective import GROUPS, WIDTHS, CollectiveFormat, Quantisation, low_bit_format
from megatron_spd.errors import UserError


@pytest.mark.parametrize(
    ("text", "scatter", "gather"),
    [
        ("int8", (8, 128), (8, 128)),
        ("int4", (4, 32), (4, 32)),
        ("int4/int8", (4, 32), (8, 128)),
        ("int5/int2", (5, 128), (2, 32)),
        ("int4/int8:g64", (4, 64), (8, 64)),
        ("int3:g256", (3, 256), (3, 256)),
    ],
)
def test_formats(text: str, scatter: tuple[int, int], gather: tuple[int, int]) -> None:
    parsed = CollectiveFormat.parse(text)
    assert parsed == CollectiveFormat(Quantisation(*scatter), Quantisation(*gather))
    assert str(parsed) == text


@given(st.sampled_from(WIDTHS), st.none() | st.sampled_from(WIDTHS), st.none() | st.sampled_from(GROUPS))
def test_what_is_written_is_read_again(scatter: int, gather: int | None, group: int | None) -> None:
    text = f"int{scatter}" + (f"/int{gather}" if gather else "") + (f":g{group}" if group else "")
    parsed = CollectiveFormat.parse(text)
    assert CollectiveFormat.parse(str(parsed)) == parsed
    assert (parsed.scatter.bits, parsed.gather.bits) == (scatter, gather or scatter)


@pytest.mark.parametrize(
    "text", ["int9", "int1", "int4/int9", "int4/int0", "int4:g48", "int4:g4", "int4:g512", "fp8", "int8 ", ""]
)
def test_anything_else_is_refused_with_the_grammar(text: str) -> None:
    with pytest.raises(UserError, match=r"expected a low-bit format int<2\.\.8>.*int4:g64") as caught:
        CollectiveFormat.parse(text)
    assert repr(text) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_low_bit_or_not() -> None:
    assert low_bit_format("full") is low_bit_format("none") is None
    assert low_bit_format("int8") == CollectiveFormat.parse("int8")
    with pytest.raises(UserError, match="'lowbit'"):
        low_bit_format("lowbit")


@pytest.mark.parametrize(
    ("text", "numel", "size"),
    [
        ("int8", 256, 2 * (128 + 10) + 12),  # rounded up to 16 bytes
        ("int6", 128, 96 + 10 + 6),
        ("int4", 64, 2 * (16 + 10) + 12),
        ("int4", 33, 2 * (16 + 10) + 12),  # two groups
        ("int2", 32, 8 + 10 + 14),
    ],
)
def test_bytes_of_a_message(text: str, numel: int, size: int) -> None:
    assert CollectiveFormat.parse(text).scatter.wire_bytes(numel) == size


def test_bytes_of_a_value() -> None:
    assert CollectiveFormat.parse("int8").bytes_per_value == 1 + 10 / 128
    assert CollectiveFormat.parse("int4/int8").bytes_per_value == (0.5 + 10 / 32 + 1 + 10 / 128) / 2


@pytest.mark.parametrize(("numel", "ranks", "chunk"), [(1, 3, 128), (385, 3, 256), (384, 3, 128)])
def test_chunks_are_whole_groups_of_both_steps(numel: int, ranks: int, chunk: int) -> None:
    assert CollectiveFormat.parse("int4/int8").chunk(numel, ranks) == chunk
