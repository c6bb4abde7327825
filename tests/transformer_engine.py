"""What Megatron-core's wrappers of Transformer Engine stand on, in plain PyTorch: enough of it to run them on a CPU.

Megatron-core's own file (``extensions/transformer_engine.py``) and ours are imported anew on top of it, so that the
code between the SPD layer and Transformer Engine's constructors and forwards is the real one. Whether Transformer
Engine itself does as its documentation says is not tested by this.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from megatron.core import tensor_parallel
from megatron.core import utils as megatron_utils
from megatron.core.models.gpt import gpt_layer_specs
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional

from megatron_spd.layers import spec

_EXTENSION = "megatron.core.extensions.transformer_engine"
_PROVIDER = "megatron.core.extensions.transformer_engine_spec_provider"
_OURS = "megatron_spd.layers.transformer_engine"
#: Newer ones have more that Megatron-core imports.
_VERSION = "2.6.0"


class Linear(nn.Module):
    """``transformer_engine.pytorch.Linear``: a column-parallel one sums the gradient of its input over ranks (or
    gathers its sequence-parallel input), a row-parallel one its output; without a mode it does neither."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool,
        fuse_wgrad_accumulation: bool,
        tp_group: ProcessGroup | None,
        tp_size: int,
        get_rng_state_tracker: Any,
        init_method: Any,
        bias: bool,
        return_bias: bool,
        parallel_mode: str | None,
        params_dtype: torch.dtype,
        device: Any,
        rng_tracker_name: str | None,
    ) -> None:
        super().__init__()
        assert tp_size == (1 if tp_group is None else tp_group.size())
        self.parallel_mode, self.sequence_parallel = parallel_mode, sequence_parallel and tp_size > 1
        self.tp_size, self._group, self._return_bias = tp_size, tp_group, return_bias
        rows = out_features // tp_size if parallel_mode == "column" else out_features
        columns = in_features // tp_size if parallel_mode == "row" else in_features
        self.weight = nn.Parameter(torch.empty(rows, columns, dtype=params_dtype))
        init_method(self.weight)
        # As there: without a bias the attribute is an empty tensor, which is no parameter.
        self.bias: Any = (
            nn.Parameter(torch.zeros(rows, dtype=params_dtype))
            if bias
            else torch.empty(0, dtype=params_dtype)
        )
        self.weight.tensor_model_parallel = True
        self.weight.partition_dim = 1 if parallel_mode == "row" else 0

    def get_extra_state(self) -> Tensor:
        """Of FP8 scales, empty without FP8."""
        return torch.empty(0)

    def set_extra_state(self, state: Tensor | None) -> None:
        pass

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Any:
        parallel = self.tp_size > 1
        if parallel and self.parallel_mode == "column":
            x = (
                tensor_parallel.gather_from_sequence_parallel_region(x, group=self._group)
                if self.sequence_parallel
                else tensor_parallel.copy_to_tensor_model_parallel_region(x, group=self._group)
            )
        added = self.bias if len(self.bias) and not self._return_bias else None
        out = functional.linear(x, self.weight, added)
        if parallel and self.parallel_mode == "row":
            out = (
                tensor_parallel.reduce_scatter_to_sequence_parallel_region(out, group=self._group)
                if self.sequence_parallel
                else tensor_parallel.reduce_from_tensor_model_parallel_region(out, group=self._group)
            )
        return (out, self.bias) if self._return_bias else out


class DotProductAttention(nn.Module):
    """``transformer_engine.pytorch.DotProductAttention`` on this rank's heads, without dropout."""

    def __init__(self, num_attention_heads: int, kv_channels: Any, **_: Any) -> None:
        super().__init__()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Any, attn_mask_type: str) -> Tensor:
        """[s, b, heads, d] and [s, b, groups, d] -> [s, b, heads * d]; ``mask`` is not read for a causal one."""
        assert attn_mask_type == "causal"
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.permute(2, 0, 1, 3).flatten(2)


def _package() -> dict[str, Any]:
    """The package's modules by name. What is not needed here is mocked, as Megatron-core itself does without it."""
    package = mock.MagicMock(name="transformer_engine", __version__=_VERSION)
    package.pytorch.Linear, package.pytorch.DotProductAttention = Linear, DotProductAttention
    return {
        "transformer_engine": package,
        "transformer_engine.pytorch": package.pytorch,
        "transformer_engine.pytorch.fp8": package.pytorch.fp8,
    }


@contextlib.contextmanager
def transformer_engine_in_pytorch() -> Iterator[None]:
    """Layer specs asked for inside are Transformer Engine's, on the classes above."""
    with contextlib.ExitStack() as undo:
        undo.enter_context(mock.patch.dict(sys.modules, _package()))
        undo.enter_context(mock.patch.object(megatron_utils, "_te_version", None))
        # mock.patch.dict brings the modules back that were there before.
        for name in (_EXTENSION, _PROVIDER, _OURS):
            sys.modules.pop(name, None)
        provider = importlib.import_module(_PROVIDER).TESpecProvider
        undo.enter_context(mock.patch.object(gpt_layer_specs, "TESpecProvider", provider, create=True))
        undo.enter_context(mock.patch.object(spec, "te", importlib.import_module(_OURS)))
        yield
