"""What the CPU runtime supplies beside Megatron-core's needs, which the distributed tests cover."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest
import torch

#: Allocates and frees 64 MiB twenty times and prints the pages that the system had to supply.
_CHURN = """
import resource, torch
from megatron_spd.runtime.cpu import keep_freed_memory
{first}
torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(first: str) -> int:
    code = _CHURN.format(first=first)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="the C library's memory counts where tensors are on the CPU"
)
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="this C library has no mallopt")
def test_freed_memory_serves_the_next_tensor() -> None:
    assert page_faults("keep_freed_memory()") * 10 < page_faults("")
