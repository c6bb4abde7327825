"""Collectives observed, or left out: the one place that replaces functions of torch.distributed, only inside a context.

Megatron-core keeps some of the functions under names of its own, so a function is replaced wherever a module of
Megatron-core, of this package or of torch.distributed refers to it.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from megatron_spd.latency.clock import Clock

#: Collectives by name, with the place and the keyword of the tensor (or list of tensors) that a rank gives in. The two
#: that end in "single" are new names, which older releases of torch do not have.
INPUTS = {
    "all_reduce": (0, "tensor"),
    "broadcast": (0, "tensor"),
    "all_gather": (1, "tensor"),
    "all_gather_into_tensor": (1, "input_tensor"),
    "all_gather_single": (1, "input_tensor"),
    "all_to_all": (1, "input_tensor_list"),
    "all_to_all_single": (1, "input"),
    "reduce_scatter": (1, "input_list"),
    "reduce_scatter_tensor": (1, "input"),
    "reduce_scatter_single": (1, "input"),
}

#: Modules whose references to a collective are replaced: these, and those of Megatron-core and this package.
_TORCH_MODULES = ("torch.distributed", "torch.distributed.distributed_c10d")
_OTHER_MODULES = "megatron"

Collective = Callable[..., Any]


@dataclass(frozen=True)
class Call:
    """One collective on this rank. ``block``: the block it happened in, None outside of all (embedding, output layer).
    ``num_bytes``: bytes that this rank gave in. ``ranks``: how many took part. ``start``, ``end``: marks of the
    recording's clock."""

    name: str
    block: int | None
    num_bytes: int
    ranks: int
    start: Any
    end: Any


@dataclass
class Recording:
    """What one forward pass did on this rank, in order: its collectives, and for each block its number and marks."""

    calls: list[Call] = field(default_factory=list)
    blocks: list[tuple[int, Any, Any]] = field(default_factory=list)
    start: Any = None
    end: Any = None


@contextlib.contextmanager
def recorded(blocks: Sequence[nn.Module], clock: Clock) -> Iterator[Recording]:
    """Record the collectives inside the context, and when each of ``blocks`` starts and ends.

    The time of a call is that of the call alone: a collective with ``async_op`` would count as done when started.
    """
    recording = Recording()
    inside: list[tuple[int, Any]] = []
    busy = False

    def observe(name: str, original: Collective) -> Collective:
        def observed(*args: Any, **kwargs: Any) -> Any:
            nonlocal busy
            if busy:  # an old name calls the new one
                return original(*args, **kwargs)
            busy, start = True, clock.mark()
            try:
                result = original(*args, **kwargs)
            finally:
                busy = False
            block = inside[-1][0] if inside else None
            size = _bytes_in(name, args, kwargs)
            ranks = dist.get_world_size(kwargs.get("group"))
            recording.calls.append(Call(name, block, size, ranks, start, clock.mark()))
            return result

        return observed

    def enter(index: int) -> Callable[..., None]:
        return lambda *_: inside.append((index, clock.mark()))

    def leave(*_: Any) -> None:
        recording.blocks.append((*inside.pop(), clock.mark()))

    hooks = [block.register_forward_pre_hook(enter(i)) for i, block in enumerate(blocks)]
    hooks += [block.register_forward_hook(leave) for block in blocks]
    try:
        with _replaced(observe):
            recording.start = clock.mark()
            yield recording
            recording.end = clock.mark()
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Leave out every collective inside the context: it returns at once, and its output is what was in memory.

    What is computed then means nothing; how long it takes is the limit of what less communication can give.
    """

    def silence(_name: str, _original: Collective) -> Collective:
        return lambda *_args, **_kwargs: None

    with _replaced(silence):
        yield


@contextlib.contextmanager
def _replaced(make: Callable[[str, Collective], Collective]) -> Iterator[None]:
    """Replace every collective by ``make(name, original)`` until the context ends."""
    originals = {name: getattr(dist, name) for name in INPUTS if hasattr(dist, name)}
    replacements = {id(f): make(name, f) for name, f in originals.items()}
    places = [
        (module, attribute, value)
        for name, module in list(sys.modules.items())
        if name in _TORCH_MODULES or name.startswith(_OTHER_MODULES)
        for attribute, value in list(vars(module).items())
        if id(value) in replacements
    ]
    try:
        for module, attribute, value in places:
            setattr(module, attribute, replacements[id(value)])
        yield
    finally:
        for module, attribute, value in places:
            setattr(module, attribute, value)


def _bytes_in(name: str, args: tuple, kwargs: dict[str, Any]) -> int:
    place, keyword = INPUTS[name]
    given = args[place] if len(args) > place else kwargs[keyword]
    tensors: Sequence[Tensor] = [given] if isinstance(given, Tensor) else given
    return sum(t.numel() * t.element_size() for t in tensors)
