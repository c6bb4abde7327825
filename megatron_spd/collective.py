"""What runs at a sync point: nothing, a full all-reduce, or a low-bit one (Flash Communication).

A low-bit all-reduce has two steps (method section 5): the ranks exchange quantised chunks and sum them (scatter), then
exchange the quantised sums (gather). Its format is written

    int<scatter bits>[/int<gather bits>][:g<group>]        int8, int4:g64, int4/int8

Without gather bits both steps use the same width; without a group each step uses its width's default. Pure Python: a
plan is read without torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from megatron_spd.errors import UserError

FULL = "full"
NONE = "none"

WIDTHS = range(2, 9)
GROUPS = (8, 16, 32, 64, 128, 256)

#: Bytes that the ends of a quantised message are rounded up to.
ALIGNMENT = 16

_PATTERN = re.compile(r"int(\d+)(?:/int(\d+))?(?::g(\d+))?")
EXPECTED = (
    f"a low-bit format int<2..8>[/int<2..8>][:g<{GROUPS[0]}..{GROUPS[-1]}, a power of two>] such as int8, int4:g64 or "
    "int4/int8"
)


@dataclass(frozen=True)
class Quantisation:
    """Values of ``bits`` in groups of ``group``, each with its own zero and step (bfloat16).

    The smallest and the largest value of a group travel as bfloat16 with their positions and do not widen the range of
    the others (spike reserving). Flash Communication V2 does so at 2 and 3 bits; here every width does, because of
    the massive activations of first tokens: on SmolLM2-135M, int8 at all points raises the perplexity by 1.2 %
    without it and by 0.03 % with it.
    """

    bits: int
    group: int

    @property
    def levels(self) -> int:
        """The greatest code."""
        return (1 << self.bits) - 1

    @property
    def planes(self) -> tuple[int, ...]:
        """Widths of the bit planes, low bits first: a code of 6 bits travels as 4 bits and 2 bits, so that planes fill
        whole bytes."""
        return tuple(width for width in (8, 4, 2, 1) if self.bits & width)

    @property
    def bytes_per_group(self) -> int:
        """Codes; zero and step; smallest and largest value with their positions, one byte each."""
        return self.group * self.bits // 8 + 10

    def wire_bytes(self, numel: int) -> int:
        """Bytes of a message of ``numel`` values: whole groups, rounded up to :data:`ALIGNMENT`."""
        size = -(-numel // self.group) * self.bytes_per_group
        return -(-size // ALIGNMENT) * ALIGNMENT

    @classmethod
    def of(cls, bits: int, group: int | None = None) -> Quantisation:
        """The quantisation with the width's default group where none is given: 128 from 5 bits on, 32 below."""
        return cls(bits, group or (128 if bits >= 5 else 32))


@dataclass(frozen=True)
class CollectiveFormat:
    """The quantisations of both steps of a low-bit all-reduce."""

    scatter: Quantisation
    gather: Quantisation

    @classmethod
    def parse(cls, text: str) -> CollectiveFormat:
        """The format that ``text`` names. Raises UserError with the grammar for anything else."""
        match = _PATTERN.fullmatch(text)
        if match is not None:
            scatter, gather, size = match.groups()
            group = None if size is None else int(size)
            bits = int(scatter), int(scatter if gather is None else gather)
            if all(width in WIDTHS for width in bits) and group in (None, *GROUPS):
                return cls(*(Quantisation.of(width, group) for width in bits))
        raise UserError(f"collective {text!r}: expected {EXPECTED}")

    def __str__(self) -> str:
        text = f"int{self.scatter.bits}"
        if self.gather.bits != self.scatter.bits:
            text += f"/int{self.gather.bits}"
        default = all(step == Quantisation.of(step.bits) for step in (self.scatter, self.gather))
        return text if default else f"{text}:g{self.scatter.group}"

    def chunk(self, numel: int, ranks: int) -> int:
        """Values that each of ``ranks`` sums: equal chunks of whole groups that together cover ``numel``."""
        group = max(self.scatter.group, self.gather.group)
        return -(-numel // (ranks * group)) * group

    @property
    def bytes_per_value(self) -> float:
        """Mean of both steps: what a full all-reduce would move by sending elements of that size."""
        steps = (self.scatter, self.gather)
        return sum(step.bytes_per_group / step.group for step in steps) / 2


def low_bit_format(collective: str) -> CollectiveFormat | None:
    """The format of a low-bit ``collective``; None for a full one or none. Raises UserError for anything else."""
    return None if collective in (FULL, NONE) else CollectiveFormat.parse(collective)
