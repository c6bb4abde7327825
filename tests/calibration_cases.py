"""Random blocks and hidden states for tests of calibration, and the plain formula's view of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megatron_spd.grouping.calibrate import Ingredients, UnitCalibrator
from megatron_spd.grouping.formulas import AttentionSettings
from megatron_spd.models.llama import LLAMA
from megatron_spd.plan import BaseModel, SPDPlan
from megatron_spd.runtime.distributed import Runtime
from tests.reference import Shape, blocks_forward, random_block

#: Ingredients with everything off, to switch single ones on.
NOTHING = {"heads": "none", "neurons": False, "shift": False, "norm": False, "refit": False}


def settings_of(shape: Shape) -> AttentionSettings:
    powers = torch.arange(0, shape.head_dim, 2, dtype=torch.float64) / shape.head_dim
    return AttentionSettings(shape.head_dim, shape.rope_theta**-powers, shape.eps)


def base_of(shape: Shape, layers: int = 1) -> BaseModel:
    return BaseModel("f", "llama", layers, shape.hidden, shape.heads, shape.kv_groups, shape.ffn)


def random_blocks(shape: Shape, layers: int, seed: int = 0, biases: bool = True) -> list[dict[str, Tensor]]:
    """Weights of ``layers`` blocks, float64 values that are float32 numbers, as a checkpoint's would be."""
    generator = torch.Generator().manual_seed(seed)
    blocks = [random_block(shape, 1, generator, biases) for _ in range(layers)]
    return [{name: t.float().double() for name, t in block.items()} for block in blocks]


def hidden_states(
    shape: Shape, sequences: int, seed: int, length: int = 24, mean: float = 0.5
) -> list[Tensor]:
    """Float32 states [length, 1, h], one chunk for a sequence, with a mean of their own in every channel."""
    generator = torch.Generator().manual_seed(seed)
    offset = mean * torch.randn(shape.hidden, generator=torch.Generator().manual_seed(7))
    return [torch.randn(length, 1, shape.hidden, generator=generator) + offset for _ in range(sequences)]


def make_calibrator(
    blocks: Sequence[Mapping[str, Tensor]],
    shape: Shape,
    branches: int,
    runtime: Runtime,
    **ingredients: object,
) -> UnitCalibrator:
    """A calibrator of ``blocks`` with the given ingredients and no others."""
    return UnitCalibrator(
        lambda i: blocks[i],
        LLAMA,
        base_of(shape, len(blocks)),
        settings_of(shape),
        branches,
        runtime,
        Ingredients(**(NOTHING | ingredients)),
    )


def schedules_of(shape: Shape, layers: int, branches: int, dropped: Sequence[int]) -> tuple[SPDPlan, range]:
    """The plan with ``dropped`` points and the one unit that they make."""
    plan = SPDPlan.dense(base_of(shape, layers), branches).with_drops(dropped)
    (unit,) = plan.units()
    return plan, unit


def output_error(
    x: Sequence[Tensor],
    blocks: Sequence[Mapping[str, Tensor]],
    dense: Sequence[Mapping[str, Tensor]],
    shape: Shape,
    branches: int,
    dropped: Sequence[int],
) -> float:
    """Energy in float64 of the difference between ``blocks`` with ``dropped`` points and the ``dense`` ones, over all
    tokens but the first of each sequence."""
    total = 0.0
    for one in x:
        wanted = blocks_forward(one.double(), dense, shape, 1, ())
        got = blocks_forward(one.double(), [_double(w) for w in blocks], shape, branches, dropped)
        total += float((got - wanted)[1:].square().sum())
    return total


def _double(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.double() for name, t in weights.items()}
