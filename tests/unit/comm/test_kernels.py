"""The kernels against their twins in PyTorch, byte for byte: Numba's, and Triton's under its interpreter.

The interpreter is chosen when the kernels are defined, so each module is tested in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from megatron_spd.collective import WIDTHS

PROGRAM = """
import importlib, sys, torch
from megatron_spd.collective import CollectiveFormat
from megatron_spd.comm import quantize

kernels = importlib.import_module("megatron_spd.comm." + sys.argv[1])
for text in sys.argv[2:]:
    fmt = CollectiveFormat.parse(text)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        torch.manual_seed(0)
        n = fmt.chunk(2500, 1)  # more than one tile, the last one not full
        x = (torch.randn(3, n) * torch.exp(2 * torch.randn(3, n))).to(dtype)
        x[1, :300] = x[1, :300].round()  # the same value several times, and both zeros
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


@pytest.mark.parametrize(("module", "package"), [("kernels", "triton"), ("cpu_kernels", "numba")])
def test_the_kernels_give_the_bytes_of_their_twins(module: str, package: str) -> None:
    pytest.importorskip(package)
    formats = [
        *(f"int{bits}" for bits in WIDTHS),
        "int4/int8",
        "int4/int8:g8",
        "int5/int3:g256",
        "int2/int8:g64",
    ]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, module, *formats],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == formats
