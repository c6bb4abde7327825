"""A random model with every kind of schedule, and prompts for it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.models import make_export, make_llama

NEW = 8
#: The third is prefilled in several chunks; the fourth shares more than one cache block with it.
LONG = [(7 * i) % 300 + 3 for i in range(150)]
PROMPTS = [[5, 17, 100, 42, 9], [250], LONG, [*LONG[:100], 8, 9]]

#: Block 0: attention dropped, with a shift and a branch norm behind it. Block 1: MLP dropped, behind a shift. Blocks 2
#: to 4: a run of dropped points through whole blocks, with shifts and norms in it. Block 5: as vLLM has it. Block 6: a
#: shift and norms where nothing is pending. Block 7: attention and the last point, which is synced in any case.
LAYERS = 8
DROPPED = [0, 3, 4, 5, 6, 7, 8, 14, 15]
SHIFTS = [(0, "mlp"), (1, "mlp"), (2, "attention"), (4, "attention"), (6, "attention")]
NORMS = [(0, "mlp"), (3, "attention"), (4, "mlp"), (6, "mlp")]
#: Formats of kept points, with and without pending sums behind them.
LOW_BIT = {1: "int8", 2: "int8:g32", 9: "int6/int8:g32", 12: "int8"}


def export(folder: Path, branches: int, low_bit: Mapping[int, str] | None = None, **model: Any) -> Path:
    """The model's export at ``folder/spd``, made from the plain one at ``folder/plain``."""
    base = make_llama(folder / "plain", layers=LAYERS, ffn=96, head_dim=32, **model)
    return make_export(base, folder / "spd", branches, DROPPED, shifts=SHIFTS, norms=NORMS, low_bit=low_bit)
