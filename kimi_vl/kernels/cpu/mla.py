"""Latent attention as native code (``mla.cpp``); :mod:`kimi_vl.kernels.reference` says what it computes.

What there is no kernel for, such as tensors of several dtypes, is left to PyTorch. ``per_head`` is what moves states
into the latent space and out of it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...quantization.weight import Weight
from .. import plain, reference
from ..attention_metadata import DecodeMetadata
from .binding import kernel, takes

# Shapes as in `reference`.


def mla_prepare(
    joined: Tensor,
    to_key: Weight,
    norm_weight: Tensor,
    rope: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    eps: float,
    decoding: int,
    per_head: Callable[..., Tensor] = reference.per_head,
) -> tuple[Tensor, Tensor]:
    """See :func:`kimi_vl.kernels.reference.mla_prepare`."""
    to_key = reference.from_key(to_key, joined.dtype)
    if not takes(joined, norm_weight, rope, kv_cache) or not kv_cache.is_contiguous():
        return plain.mla_prepare(joined, to_key, norm_weight, rope, kv_cache, slot_mapping, eps, decoding)
    joined, rope = joined.contiguous(), rope.contiguous()
    (tokens, both), (heads, rank, nope) = rope.shape, to_key.shape
    rotary = both // 2
    query = torch.empty(decoding, heads, rank + rotary, dtype=joined.dtype)
    rotated = torch.empty(tokens - decoding, heads, rotary, dtype=joined.dtype)
    kernel("mla_prepare", joined.dtype, "pppfpiiiiiippp")(
        joined.data_ptr(), norm_weight.data_ptr(), rope.data_ptr(), eps, slot_mapping.data_ptr(),
        tokens, decoding, heads, nope, rotary, rank,
        kv_cache.data_ptr(), query.data_ptr(), rotated.data_ptr(),
    )  # fmt: skip
    if decoding:
        own = joined[:decoding, : heads * (nope + rotary)].unflatten(-1, (heads, -1))[..., :nope]  # (B, N, Q)
        query[..., :rank] = per_head(own, to_key)
    return query, rotated


def mla_decode(
    query: Tensor,
    kv_cache: Tensor,
    decode: DecodeMetadata,
    scale: float,
    to_value: Weight,
    splits: int = 0,
    per_head: Callable[..., Tensor] = reference.per_head,
) -> Tensor:
    """See :func:`kimi_vl.kernels.reference.mla_decode`."""
    if not takes(query, kv_cache) or not kv_cache.is_contiguous():
        return plain.mla_decode(query, kv_cache, decode, scale, to_value, splits)
    query, page_table = query.contiguous(), decode.page_table.contiguous()
    (sequences, heads, width), rank = query.shape, to_value.shape[-1]
    mixed = torch.empty(sequences, heads, rank, dtype=query.dtype)
    kernel("mla_decode", query.dtype, "ppppiiiiiifp")(
        query.data_ptr(), kv_cache.data_ptr(), page_table.data_ptr(), decode.seq_lens.data_ptr(),
        sequences, heads, rank, width - rank, page_table.shape[1], decode.page_size, scale, mixed.data_ptr(),
    )  # fmt: skip
    return per_head(mixed, to_value)
