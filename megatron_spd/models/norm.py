"""A norm with its parameters, where no module holds it: what is put in front of the output layer, and calibration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

#: As Megatron-core's ``TransformerConfig.normalization`` has them. A LayerNorm has a bias.
NormKind = Literal["RMSNorm", "LayerNorm"]


@dataclass(frozen=True)
class Norm:
    """``weight`` and ``bias`` [h] (None for an RMSNorm)."""

    kind: NormKind
    eps: float
    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """[..., h] -> [..., h]."""
        if self.kind == "RMSNorm":
            return functional.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)

    def to(self, device: torch.device, dtype: torch.dtype) -> Norm:
        """The same norm elsewhere."""
        bias = None if self.bias is None else self.bias.to(device, dtype)
        return Norm(self.kind, self.eps, self.weight.to(device, dtype), bias)
