"""Attention by torch, where neither a kernel nor FlashAttention computes it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

# On compute capabilities 9.0 and 10.0 torch prefers cuDNN's, which builds a plan for every shape that it has not seen;
# the shapes of prompts and images are new in nearly every step.
_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """``scaled_dot_product_attention``: heads (B, N, S, V) of queries (B, N, S, D), keys (B, N, L, D) and values
    (B, N, L, V).

    ``mask`` (…, S, L) is true where a query may attend; ``causal`` is for S = L and no mask.
    """
    width = value.shape[-1]
    if query.is_cuda:
        with sdpa_kernel(_BACKENDS):
            return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal, scale=scale)
    if query.device.type == "cpu" and query.dtype == torch.bfloat16:
        # torch's fused attention takes values as wide as keys; at 1,024 tokens it is 3 times as fast
        value = F.pad(value, (0, max(0, key.shape[-1] - width)))
    heads = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal, scale=scale)
    return heads[..., :width]
