"""Norms and the router as native code (``norm.cpp``); :mod:`kimi_vl.kernels.reference` says what they compute.

What there is no kernel for, such as tensors of several dtypes, is left to the reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from .binding import kernel, takes

# Shapes as in `reference`.


def add_rms_norm(residual: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See :func:`kimi_vl.kernels.reference.add_rms_norm`."""
    if not takes(residual, weight, *(() if delta is None else (delta,))):
        return reference.add_rms_norm(residual, delta, weight, eps)
    residual, delta = residual.contiguous(), None if delta is None else delta.contiguous()
    normed, width = torch.empty_like(residual), residual.shape[-1]
    total = residual if delta is None else torch.empty_like(residual)
    kernel("add_rms_norm", residual.dtype, "pppfiipp")(
        residual.data_ptr(), None if delta is None else delta.data_ptr(), weight.data_ptr(), eps,
        residual.numel() // width, width, total.data_ptr(), normed.data_ptr(),
    )  # fmt: skip
    return total, normed


def norm_router(
    residual: Tensor,
    delta: Tensor,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor,
    top_k: int,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`kimi_vl.kernels.reference.norm_router`."""
    if not takes(residual, delta, norm_weight, weight):
        return reference.norm_router(residual, delta, norm_weight, eps, weight, bias, top_k, scaling)
    residual, delta, weight, bias = residual.contiguous(), delta.contiguous(), weight.contiguous(), bias.float()
    tokens, (experts, width) = residual.shape[0], weight.shape
    total, normed = torch.empty_like(residual), torch.empty_like(residual)
    topk_ids = torch.empty(tokens, top_k, dtype=torch.int32)
    topk_weights = torch.empty(tokens, top_k, dtype=torch.float32)
    kernel("norm_router", residual.dtype, "pppfppiiiifpppp")(
        residual.data_ptr(), delta.data_ptr(), norm_weight.data_ptr(), eps, weight.data_ptr(), bias.data_ptr(),
        tokens, width, experts, top_k, scaling,
        total.data_ptr(), normed.data_ptr(), topk_ids.data_ptr(), topk_weights.data_ptr(),
    )  # fmt: skip
    return total, normed, topk_ids, topk_weights
