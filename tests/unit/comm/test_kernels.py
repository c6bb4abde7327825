"""The Triton kernels against their twins in PyTorch, byte for byte, under Triton's interpreter.

The interpreter is chosen when the kernels are defined, so they run in a process of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from megatron_spd.collective import WIDTHS

pytest.importorskip("triton")

PROGRAM = """
import sys, torch
from megatron_spd.collective import CollectiveFormat
from megatron_spd.comm import kernels, quantize

for text in sys.argv[1:]:
    fmt = CollectiveFormat.parse(text)
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        n = fmt.chunk(2500, 1)  # more than one tile, the last one not full
        x = (torch.randn(3, n) * torch.exp(2 * torch.randn(3, n))).to(dtype)
        wire = quantize.quantise(x, fmt.scatter)
        assert torch.equal(kernels.quantise(x, fmt.scatter), wire), (text, dtype)
        values = quantize.dequantise(wire, n, fmt.scatter)
        assert torch.equal(kernels.dequantise(wire, n, fmt.scatter), values), (text, dtype)
        total = quantize.requantised_sum(wire, n, fmt.scatter, fmt.gather)
        assert torch.equal(kernels.requantised_sum(wire, n, fmt.scatter, fmt.gather), total), (text, dtype)
        x[0, 5], x[1, 700], x[2, -1] = torch.nan, torch.inf, -torch.inf
        x.view(torch.int16)[0, -1] = -1  # a NaN whose bits are all set (bf16), or the half of one
        broken = kernels.dequantise(kernels.quantise(x, fmt.scatter), n, fmt.scatter)
        twin = quantize.dequantise(quantize.quantise(x, fmt.scatter), n, fmt.scatter)
        assert not broken[~x.isfinite()].isfinite().any()
        assert torch.equal(broken.isfinite(), twin.isfinite())
        assert torch.equal(broken[broken.isfinite()], twin[twin.isfinite()]), (text, dtype)
    print(text)
"""


def test_the_kernels_give_the_bytes_of_their_twins() -> None:
    formats = [
        *(f"int{bits}" for bits in WIDTHS),
        "int4/int8",
        "int4/int8:g8",
        "int5/int3:g256",
        "int2/int8:g64",
    ]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *formats],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == formats
