"""The DeepSpeed engine around a student: its configuration, and its view of the tensor-parallel groups."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from megatron_spd.errors import UserError
from megatron_spd.layers.block import SPDTransformerLayer
from megatron_spd.runtime.cpu import keep_freed_memory, without_compiled_collectives

#: Most elements that DeepSpeed reduces at a time under ZeRO, its own default.
BUCKET = 500_000_000


@dataclass(frozen=True)
class EngineSettings:
    """What the recipe asks of DeepSpeed. ``config_file``: a ds_config.json; what it sets wins, what it lacks
    or calls "auto" comes from the other fields."""

    learning_rate: float
    micro_batch_size: int
    gradient_accumulation: int
    gradient_clipping: float
    weight_decay: float
    warmup_ratio: float
    zero_stage: int
    dtype: str
    config_file: str | None = None


def deepspeed_config(settings: EngineSettings, steps: int) -> dict[str, Any]:
    """The whole DeepSpeed configuration for a unit of ``steps`` optimizer steps.

    Raises UserError for a file that is missing or no JSON, for an unknown ZeRO stage, and for bf16 without
    ZeRO (DeepSpeed then keeps no float32 weights).
    """
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": settings.micro_batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation,
        "gradient_clipping": settings.gradient_clipping,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": settings.learning_rate,
                "betas": [0.9, 0.95],
                "eps": 1e-8,
                "weight_decay": settings.weight_decay,
                "torch_adam": not torch.cuda.is_available(),
            },
        },
        "scheduler": {
            "type": "WarmupCosineLR",
            "params": {
                "total_num_steps": steps,
                "warmup_num_steps": max(2, round(settings.warmup_ratio * steps)),
                "warmup_min_ratio": 0.1,
                "cos_min_ratio": 0.05,
            },
        },
        "zero_optimization": {"stage": settings.zero_stage},
        "bf16": {"enabled": settings.dtype == "bf16"},
        "steps_per_print": 10**9,
    }
    config = _overlay(config, _read(settings.config_file))
    stage, bf16 = config["zero_optimization"].get("stage", 0), config["bf16"].get("enabled")
    if stage not in (0, 1, 2, 3):
        raise UserError(f"ZeRO stage {stage} was asked for; the stages are 0, 1, 2 and 3")
    if bf16 and stage == 0:
        raise UserError(
            "bf16 with ZeRO stage 0 was asked for; use --zero-stage 1, 2 or 3 with bf16, or --dtype fp32"
        )
    if bool(bf16) != (settings.dtype == "bf16"):
        raise UserError(
            f"the DeepSpeed config has bf16 enabled = {bf16}, but --dtype is {settings.dtype}; make them agree"
        )
    return config


def _read(path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no DeepSpeed config at {path}; launch/ds_config/ has examples") from None
    except json.JSONDecodeError as error:
        raise UserError(f"the DeepSpeed config {path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(
            f"the DeepSpeed config {path} holds a {type(config).__name__}; an object was expected"
        )
    return config


def _overlay(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """``top`` over ``base``, section by section: "auto" leaves ours, null removes it, another "type" (of
    optimizer or scheduler) replaces it with the learning rate filled in."""
    merged = dict(base)
    for key, value in top.items():
        ours = base.get(key)
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, dict) and isinstance(ours, dict):
            if value.get("type", ours.get("type")) != ours.get("type"):
                rate = {"lr": ours["params"]["lr"]} if key == "optimizer" else {}
                ours = {"params": rate}
            merged[key] = _overlay(ours, value)
        elif value != "auto":
            merged[key] = value
    return merged


def model_parallel_unit() -> SimpleNamespace:
    """What DeepSpeed calls ``mpu``: how it learns which ranks share a model, for gradient norms and
    data-parallel averages."""
    names = [name for name in dir(parallel_state) if name.startswith("get_")]
    mpu = SimpleNamespace(**{name: getattr(parallel_state, name) for name in names})
    mpu.get_model_parallel_rank = parallel_state.get_tensor_model_parallel_rank
    mpu.get_model_parallel_world_size = parallel_state.get_tensor_model_parallel_world_size
    mpu.get_model_parallel_group = parallel_state.get_tensor_model_parallel_group
    return mpu


@contextlib.contextmanager
def whole(parameters: Iterable[nn.Parameter], write: bool = False) -> Iterator[None]:
    """Inside, ``parameters`` are whole on every rank also under ZeRO-3, which spreads them over the replicas: then a
    collective of these. ``write``: they are changed inside, on all replicas alike."""
    spread = [p for p in parameters if hasattr(p, "ds_id")]
    if not spread:
        yield
        return
    import deepspeed

    first = dist.get_global_rank(parallel_state.get_data_parallel_group(), 0) if write else None
    with deepspeed.zero.GatheredParameters(spread, modifier_rank=first):
        yield


def use_outside(module: nn.Module, parameter: nn.Parameter) -> None:
    """Say that ``module``'s forward uses ``parameter``, which another module has: ZeRO-3 then gathers it for both."""
    import deepspeed

    deepspeed.zero.register_external_parameter(module, parameter)


def _gather_layer_by_layer(student: nn.Module) -> None:
    """Let ZeRO-3 gather an SPD layer's parameters all together when the layer begins.

    By itself it gathers those of each module when that module is called, and the layer uses some (norms, output biases)
    outside of their modules. Gradients are then averaged when that of the layer's input is there: one is asked for
    also where nothing in front of the layer trains.
    """
    from deepspeed.utils import set_z3_leaf_modules

    def want_gradient(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, *others = inputs
        if torch.is_grad_enabled() and not x.requires_grad:
            x = x.detach().requires_grad_()
        return x, *others

    for layer in set_z3_leaf_modules(student, [SPDTransformerLayer], raise_if_not_found=False):
        if any(p.requires_grad for p in layer.parameters()):
            layer.register_forward_pre_hook(want_gradient)


def make_engine(student: nn.Module, config: dict[str, Any]) -> Any:
    """A DeepSpeed engine that trains every parameter of ``student`` that requires a gradient."""
    import deepspeed
    from deepspeed.utils import logger

    without_compiled_collectives()
    keep_freed_memory()
    # DeepSpeed insists on it; a process that no launcher started is the only one of its machine.
    os.environ.setdefault("LOCAL_RANK", "0")
    # Its warnings go to standard output, one for every engine.
    logger.setLevel("ERROR")
    trainable = [p for p in student.parameters() if p.requires_grad]
    zero = config["zero_optimization"]
    if zero.get("stage"):
        # DeepSpeed makes its buffer as large as it may be, also for a unit of few parameters.
        size = min(BUCKET, sum(p.numel() for p in trainable))
        config = config | {"zero_optimization": {"reduce_bucket_size": size} | zero}
    if zero.get("stage") == 3:
        _gather_layer_by_layer(student)
    engine, *_ = deepspeed.initialize(
        model=student,
        model_parameters=trainable,
        config=config,
        mpu=model_parallel_unit(),
        dist_init_required=False,
    )
    if engine.lr_scheduler is not None:
        # DeepSpeed's schedulers begin one step before their first, at a rate of zero.
        engine.lr_scheduler.step()
    return engine


def end_engine(engine: Any) -> None:
    """Let go of ``engine``, and give PyTorch back what DeepSpeed replaced in it: the linear function of ZeRO-3, which
    keeps no gathered weights for the backward pass, has no forward-mode derivatives (calibration asks for them)."""
    from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses as Replaced

    engine.destroy()
    nn.functional.linear = getattr(Replaced, "linear_bk", nn.functional.linear)
