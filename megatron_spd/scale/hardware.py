"""What an estimate of time assumes of the machine."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Hardware:
    """One device of a rank. ``tflops``: dense peak in 10^12 operations per second by type of number; ``memory``: bytes,
    None where ranks share what the machine has; ``link``: GB/s that a rank sends to ranks of its node."""

    name: str
    tflops: dict[str, float]
    memory: int | None
    link: float

    @property
    def is_cpu(self) -> bool:
        return self.memory is None


_GB = 10**9

#: From the vendors' data sheets (dense, without sparsity; link: one direction). fp32 on A100 and later: TF32 is not
#: assumed. cpu: one core with 512-bit vectors at 2 GHz.
HARDWARE = {
    h.name: h
    for h in (
        Hardware("a100-80gb", {"bf16": 312, "fp32": 19.5, "fp64": 9.7}, 80 * _GB, 300),
        Hardware("h100-80gb", {"bf16": 989, "fp32": 67, "fp64": 34}, 80 * _GB, 450),
        Hardware("h200-141gb", {"bf16": 989, "fp32": 67, "fp64": 34}, 141 * _GB, 450),
        Hardware("l40-48gb", {"bf16": 181, "fp32": 90, "fp64": 1.4}, 48 * _GB, 32),
        Hardware("cpu", {"bf16": 0.06, "fp32": 0.06, "fp64": 0.03}, None, 5),
    )
}
