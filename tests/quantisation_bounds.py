"""How far a quantised value may be from the true one, by the formulas of ``comm/quantize.py`` in float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_spd.collective import CollectiveFormat, Quantisation
from megatron_spd.comm.quantize import LEAST_STEP

#: One part in 2^7: what rounding to bfloat16 in a fixed direction may change at most; half of it to the nearest.
_BF16 = 2.0**-7
#: Roundings of float32 on the way of one value, generously.
_FP32 = 2.0**-20


def error_bound(x: Tensor, fmt: Quantisation) -> Tensor:
    """Greatest distance of each value of ``x`` [..., n] from what comes back, n any length: half a step."""
    n = x.shape[-1]
    groups = F.pad(x.double(), (0, -n % fmt.group)).unflatten(-1, (-1, fmt.group))
    inner = groups.sort(-1).values[..., 1:-1]
    low, high = inner[..., :1], inner[..., -1:]
    # The smallest and the largest are rounded by themselves.
    spikes = torch.where((groups <= low) | (groups >= high), groups.abs() * _BF16 / 2, 0.0)
    # zero may lie below the smallest value by a rounding, and the step above by another one.
    step = ((high - low + low.abs() * _BF16) / fmt.levels * (1 + _BF16)).clamp_min(LEAST_STEP)
    bound = torch.maximum(step / 2, spikes) + groups.abs() * _FP32 + step * _FP32 * 256
    return bound.flatten(-2)[..., :n]


def sum_bound(partials: Tensor, fmt: CollectiveFormat) -> Tensor:
    """The same for the low-bit sum [n] of ``partials`` [G, n]: every message's half step, and the sum's own."""
    exact = partials.double().sum(0)
    scatter = error_bound(partials, fmt.scatter).sum(0)
    # The sum that is quantised may lie off by ``scatter``, which widens its group's range twice.
    n = len(exact)
    padded = F.pad(scatter, (0, -n % fmt.gather.group)).unflatten(0, (-1, fmt.gather.group))
    widest = padded.amax(-1, keepdim=True).expand_as(padded).flatten()[:n]
    gather = error_bound(exact, fmt.gather)
    return scatter + gather + widest * 2 * (1 + _BF16) ** 2 / fmt.gather.levels + widest * _BF16
