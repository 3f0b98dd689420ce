"""What vision tower and decoder have in common: weights by name, linear maps, norms, rotary positions, attention."""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import mindspore as ms
import numpy as np
import torch
from mindspore import Tensor, ops

_SCORES = 2**24  # attention scores at a time: 64 MiB of float32
_TOKENS = 1024  # at a time in what is wider than the hidden size
_UNSEEN = 1e30  # subtracted from the score of what a query may not see; infinity would make padding NaN

_gemm = ops.MatMul(transpose_b=True)  # with two dimensions: what takes more runs a slower kernel on a CPU
bmm, bmm_transposed = ops.BatchMatMul(), ops.BatchMatMul(transpose_b=True)


class Weights:
    """Tensors by their names in the checkpoint; ``weights / "mlp"`` are those below that name."""

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str = ""):
        self._tensors, self._prefix = tensors, prefix

    def __truediv__(self, name: str) -> Weights:
        return Weights(self._tensors, f"{self._prefix}{name}.")

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self._prefix + name]

    def __contains__(self, name: str) -> bool:
        return self._prefix + name in self._tensors


def from_torch(values: torch.Tensor, dtype: Any) -> Tensor:
    """``values`` as a MindSpore tensor of ``dtype``, without a copy where the memory can be shared."""
    wanted = {ms.float32: torch.float32, ms.float16: torch.float16, ms.bfloat16: torch.bfloat16}[dtype]
    values = values.to(wanted).contiguous()
    if wanted != torch.bfloat16:
        return Tensor.from_numpy(values.numpy())
    # NumPy has no bfloat16, so its bits travel as integers
    return Tensor.from_numpy(values.view(torch.int16).numpy().view(np.uint16)).view(ms.bfloat16)


def linear(weights: Weights, states: Tensor) -> Tensor:
    """``states @ weight.T``, plus the bias if there is one: (…, in_features) to (…, out_features)."""
    product = gemm(states, weights["weight"])
    return product + weights["bias"] if "bias" in weights else product


def gemm(states: Tensor, weight: Tensor) -> Tensor:
    """``states @ weight.T``: (…, I) and (O, I) to (…, O)."""
    return _gemm(states.reshape(-1, states.shape[-1]), weight).reshape(*states.shape[:-1], -1)


def layer_norm(weights: Weights, states: Tensor, eps: float) -> Tensor:
    norm = ops.LayerNorm(begin_norm_axis=-1, begin_params_axis=-1, epsilon=eps)
    return norm(states, weights["weight"], weights["bias"])[0]


def rms_norm(weights: Weights, states: Tensor, eps: float) -> Tensor:
    """Root mean square norm in float32; the weight multiplies after the cast back."""
    wide = states.astype(ms.float32)
    normed = wide * ops.rsqrt(ops.square(wide).mean(-1, keep_dims=True) + eps)
    return weights["weight"] * normed.astype(states.dtype)


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate adjacent pairs of components of ``states`` (…, D), interleaved as they came; ``cos`` and ``sin`` are
    (…, D/2)."""
    pairs = states.reshape(*states.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]  # (…, D/2)
    return ops.stack((even * cos - odd * sin, even * sin + odd * cos), axis=-1).reshape(states.shape)


def attention(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, causal: bool = False, valid: Tensor | None = None
) -> Tensor:
    """Heads (B, N, S, V) of ``query`` (B, N, S, D) over ``key`` (B, N, L, D) and ``value`` (B, N, L, V).

    Computed in blocks of queries, so that memory grows with L and not with S·L. ``causal`` says that the queries are
    the last S of L tokens and see none that follows; ``valid`` (B, L), float32, is 0 where a key is padding, else 1.
    """
    (batch, heads, queries, _), keys = query.shape, key.shape[2]
    past, index = keys - queries, Tensor(np.arange(keys, dtype=np.int32))
    size, blocks = max(1, _SCORES // (batch * heads * keys)), []
    for first in range(0, queries, size):
        last = min(first + size, queries)
        seen = past + last if causal else keys
        scores = bmm_transposed(query[:, :, first:last], key[:, :, :seen]).astype(ms.float32) * scale
        if causal:
            scores = scores + hidden(index[None, :seen] <= index[past + first : seen, None])
        if valid is not None:
            scores = scores + hidden(valid[:, None, None, :seen])
        blocks.append(bmm(ops.softmax(scores, -1).astype(value.dtype), value[:, :, :seen]))
    return blocks[0] if len(blocks) == 1 else ops.cat(blocks, axis=2)


def hidden(visible: Tensor) -> Tensor:
    """What is added to scores: 0 where ``visible`` is true or 1, and what leaves nothing of a score where it is 0."""
    return (visible.astype(ms.float32) - 1.0) * _UNSEEN


def in_blocks(function: Callable[[Tensor], Tensor], states: Tensor) -> Tensor:
    """``function`` of the vectors in ``states`` (…, H), (T, H) to (T, H), some at a time, which bounds the memory of
    what it computes in between."""
    tokens = states.reshape(-1, states.shape[-1])
    blocks = [function(tokens[first : first + _TOKENS]) for first in range(0, tokens.shape[0], _TOKENS)]
    return ops.cat(blocks).reshape(states.shape)
