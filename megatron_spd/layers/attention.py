"""Core attention for evaluation and inference: PyTorch's fused kernel in the place of a softmax written out."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.dot_product_attention import DotProductAttention
from torch import Tensor


class FusedCausalAttention(DotProductAttention):
    """Causal attention without dropout, over whole sequences that start at position 0 or of one new token each over
    all before it (a KV cache); within the sliding window of the config, if it has one.

    The scores [b, heads, s, s] are never in memory, and their upper half is never computed.
    """

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``query`` [s, b, heads, d], ``key`` and ``value`` [t, b, groups, d] -> [s, b, heads * d]; s is t or 1.

        The further arguments of the stock module (its mask) are not looked at. Raises ValueError for another s.
        """
        if query.shape[0] not in (1, key.shape[0]):
            raise ValueError(
                f"{query.shape[0]} queries over {key.shape[0]} keys; expected as many, or one query"
            )
        window = self.config.window_size
        if window is not None and query.shape[0] == 1:
            key, value = key[-window[0] - 1 :], value[-window[0] - 1 :]
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        mask = None
        if window is not None and window[0] + 1 < query.shape[0]:
            ones = torch.ones(len(query), len(query), dtype=torch.bool, device=query.device)
            mask = ones.tril() & ones.triu(-window[0])
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None and query.shape[0] > 1,
            scale=self.softmax_scale,
            enable_gqa=True,
        )
        return out.permute(2, 0, 1, 3).flatten(2)
