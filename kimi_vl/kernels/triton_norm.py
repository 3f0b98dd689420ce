"""Residual addition and RMS norm in one kernel: one program a token, with the whole hidden state in registers.

Memory traffic: two vectors read and two written for each token, one and one without a residual. Unfused, the sum is
read once more.
"""

# Options of a launch (num_warps and so on) are no parameters of a kernel.
# pyright: reportCallIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _add_rms_norm(residual, delta, weight, total, normed, width, eps, HAS_DELTA: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * width
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    value = tl.load(residual + at + columns, mask=inside, other=0.0)
    if HAS_DELTA:
        added = tl.load(delta + at + columns, mask=inside, other=0.0)
        # rounded as it is stored: the norm is that of the stored sum
        value = (value.to(tl.float32) + added.to(tl.float32)).to(value.dtype)
        tl.store(total + at + columns, value, mask=inside)
    wide = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / width + eps)
    factor = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    result = (wide * scale).to(value.dtype).to(tl.float32) * factor
    tl.store(normed + at + columns, result.to(value.dtype), mask=inside)


def add_rms_norm(residual: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See :func:`kimi_vl.kernels.reference.add_rms_norm`."""
    width = residual.shape[-1]
    residual = residual.contiguous()
    total = residual if delta is None else torch.empty_like(residual)
    normed = torch.empty_like(residual)
    tokens = residual.numel() // width
    if tokens:
        block = triton.next_power_of_2(width)
        _add_rms_norm[(tokens,)](
            residual,
            residual if delta is None else delta.contiguous(),
            weight,
            total,
            normed,
            width,
            eps,
            HAS_DELTA=delta is not None,
            BLOCK=block,
            num_warps=min(8, max(1, block // 256)),
        )
    return total, normed
