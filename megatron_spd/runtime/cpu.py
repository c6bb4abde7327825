"""What Megatron-core expects of CUDA, supplied on a machine that has none.

The only place that replaces functions of other packages, called by ``runtime.distributed.initialize`` and
only where no CUDA device exists. On a GPU machine nothing here runs.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.fusions import fused_softmax
from megatron.core.tensor_parallel import random as megatron_random
from torch.overrides import TorchFunctionMode

#: Parameters of the C library's mallopt (malloc.h).
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


class CpuRNGStatesTracker(megatron_random.CudaRNGStatesTracker):
    """Megatron-core's tracker of named random states over the CPU generator."""

    def add(self, name: str, seed: int) -> None:
        """Track a state under ``name``, started from ``seed``."""
        self._is_initialized = True
        if name in self.states_:
            raise ValueError(f"random state {name!r} is already tracked")
        self.seeds_.add(seed)
        self.states_[name] = torch.Generator().manual_seed(seed).get_state()

    @contextlib.contextmanager
    def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
        """Draw from the tracked state ``name`` inside the context."""
        outer = torch.get_rng_state()
        torch.set_rng_state(self.states_[name])
        try:
            yield
        finally:
            self.states_[name] = torch.get_rng_state()
            torch.set_rng_state(outer)


def _get_rng_state(*_: Any, **__: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, *_: Any, **__: Any) -> None:
    torch.set_rng_state(new_state)


def _window_mask(queries: int, keys: int, window: tuple[int, int]) -> torch.Tensor:
    """True where a query must not look: the same as Megatron-core's, which is made on "cuda"."""
    offset = keys - queries
    seen = torch.ones(queries, keys, dtype=torch.bool).triu(offset - window[0]).tril(offset + window[1])
    return ~seen


def prepare_cpu_runtime() -> None:
    """Make Megatron-core's device calls answer for the CPU. Does nothing where CUDA is available; may be
    called twice."""
    if torch.cuda.is_available():
        return
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment, return-value]
    torch.cuda.synchronize = lambda *_: None
    torch.cuda.current_stream = lambda *_: None  # type: ignore[assignment]
    fused_softmax.get_sliding_window_causal_mask = _window_mask
    megatron_random._get_cuda_rng_state = _get_rng_state
    megatron_random._set_cuda_rng_state = _set_rng_state
    if not isinstance(megatron_random._CUDA_RNG_STATE_TRACKER, CpuRNGStatesTracker):
        megatron_random._CUDA_RNG_STATE_TRACKER = CpuRNGStatesTracker()
        megatron_random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True


class _CudaOnCpu(TorchFunctionMode):
    """Makes tensors of ``device="cuda"`` and ``Tensor.cuda()`` on the CPU, and calls types those of CUDA tensors."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0]
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        result = func(*args, **kwargs)
        if func is torch.Tensor.type and isinstance(result, str):
            return result.replace("torch.", "torch.cuda.", 1)
        return result


def cuda_on_cpu() -> contextlib.AbstractContextManager[Any]:
    """A context for the parts of Megatron-core that ask for CUDA tensors by name: pipeline schedules, tied embeddings
    of several stages, its optimizers. Does nothing where CUDA is available."""
    return contextlib.nullcontext() if torch.cuda.is_available() else _CudaOnCpu()


def keep_freed_memory() -> None:
    """Let the C library keep the memory of freed tensors for the next ones.

    By default it gives large blocks back to the system and gets them again, page by page, at every step: a third of
    the time of a training step on the CPU. Does nothing where CUDA is available, or with another C library.
    """
    if torch.cuda.is_available():
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)


def without_compiled_collectives() -> None:
    """Keep DeepSpeed from compiling its shared-memory all-reduce at start-up (half a minute, and a compiler,
    for a collective that distillation does not use). Does nothing where CUDA is available."""
    if torch.cuda.is_available():
        return
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
