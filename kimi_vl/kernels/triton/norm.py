"""Residual addition and RMS norm in one kernel: one program a token, with the whole hidden state in registers.

Memory traffic: two vectors read and two written for each token, one and one without a residual. Unfused, the sum is
read once more.

With the router behind it there are two ways:

- Few tokens, as in a decode step: what counts is how long one program takes. A program of the first kernel adds,
  normalises and multiplies a token's state by some of the router's rows; the second kernel selects experts. All
  programs of a token read its state, from the L2 cache but for the first.
- More tokens: one kernel, 16 tokens a program, with tl.dot. Two vectors are read and two written for each token, and
  the router's weight (E, H) is read once for each program. Hidden states are read twice, first for their mean square
  and then for the scores; the second time they are in the cache.
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


FEW = 128
"""The most tokens that are normalised by several programs each."""
_TILE = 8192  # of the router's weight, values that such a program holds
_TOKENS = 16  # of a program otherwise: the least that tl.dot takes


@triton.jit
def _added(residual, delta, place, mask):
    """The sum as it is stored, which is what the norm is taken of."""
    value = tl.load(residual + place, mask=mask, other=0.0)
    added = tl.load(delta + place, mask=mask, other=0.0)
    return (value.to(tl.float32) + added.to(tl.float32)).to(value.dtype)


@triton.jit
def _select(
    logits,
    bias,
    topk_ids,
    topk_weights,
    token,
    real,
    experts,
    scaling,
    TOP_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_TOPK: tl.constexpr,
):
    """Experts of the tokens whose router logits (BLOCK_M, BLOCK_N) are given, and their weights."""
    ids = tl.arange(0, BLOCK_N)
    known = ids < experts
    scores = 1.0 / (1.0 + tl.exp(-logits))
    choice = scores + tl.load(bias + ids, mask=known, other=0.0).to(tl.float32)[None, :]
    # NaN scores are chosen last. Padding experts are never chosen: argmax takes the first of equals, and they come last
    choice = tl.where(known[None, :] & (choice == choice), choice, float("-inf"))
    slots = tl.arange(0, BLOCK_TOPK)
    best_ids = tl.zeros((BLOCK_M, BLOCK_TOPK), dtype=tl.int32)
    best = tl.zeros((BLOCK_M, BLOCK_TOPK), dtype=tl.float32)
    for slot in tl.static_range(TOP_K):
        winner = tl.argmax(choice, axis=1)  # (BLOCK_M)
        hit = ids[None, :] == winner[:, None]
        score = tl.sum(tl.where(hit, scores, 0.0), axis=1)
        here = slots[None, :] == slot
        best_ids = tl.where(here, winner[:, None], best_ids)
        best = tl.where(here, score[:, None], best)
        choice = tl.where(hit, float("-inf"), choice)
    best = best / (tl.sum(best, axis=1)[:, None] + 1e-20) * scaling
    place = token[:, None] * TOP_K + slots[None, :]
    kept = real[:, None] & (slots < TOP_K)[None, :]
    tl.store(topk_ids + place, best_ids, mask=kept)
    tl.store(topk_weights + place, best, mask=kept)


@triton.jit(do_not_specialize=["tokens"])
def _norm_router(
    residual,
    delta,
    norm_weight,
    weight,
    bias,
    total,
    normed,
    topk_ids,
    topk_weights,
    tokens,
    width,
    experts,
    eps,
    scaling,
    TOP_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_TOPK: tl.constexpr,
):
    token = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    ids = tl.arange(0, BLOCK_N)
    real, known = token < tokens, ids < experts
    first = token.to(tl.int64)[:, None] * width
    squares = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    for begin in range(0, width, BLOCK_K):
        at = begin + tl.arange(0, BLOCK_K)
        mask = real[:, None] & (at < width)[None, :]
        value = _added(residual, delta, first + at[None, :], mask)
        tl.store(total + first + at[None, :], value, mask=mask)
        squares += value.to(tl.float32) * value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(squares, axis=1) / width + eps)  # (BLOCK_M)
    logits = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for begin in range(0, width, BLOCK_K):
        at = begin + tl.arange(0, BLOCK_K)
        within = at < width
        mask = real[:, None] & within[None, :]
        value = _added(residual, delta, first + at[None, :], mask)
        factor = tl.load(norm_weight + at, mask=within, other=0.0).to(tl.float32)
        state = (value.to(tl.float32) * scale[:, None]).to(value.dtype).to(tl.float32) * factor[None, :]
        state = state.to(value.dtype)
        tl.store(normed + first + at[None, :], state, mask=mask)
        columns = tl.load(
            weight + ids[None, :] * width + at[:, None], mask=known[None, :] & within[:, None], other=0.0
        )  # (BLOCK_K, BLOCK_N)
        if state.dtype != columns.dtype:
            state, columns = state.to(tl.float32), columns.to(tl.float32)
        # bfloat16 products are exact in float32; rounding float32 inputs to tf32 would change the routing
        logits = tl.dot(state, columns, logits, input_precision="ieee")
    _select(
        logits, bias, topk_ids, topk_weights, token, real, experts, scaling, TOP_K, BLOCK_M, BLOCK_N, BLOCK_TOPK
    )  # fmt: skip


@triton.jit
def _norm_logits(
    residual,
    delta,
    norm_weight,
    weight,
    total,
    normed,
    logits,
    width,
    experts,
    eps,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = tl.arange(0, BLOCK_K)
    ids = part * BLOCK_N + tl.arange(0, BLOCK_N)
    within, known = at < width, ids < experts
    # first, so that it is on its way meanwhile
    rows = tl.load(weight + ids[:, None] * width + at[None, :], mask=known[:, None] & within[None, :], other=0.0)
    value = _added(residual, delta, token * width + at, within)
    factor = tl.load(norm_weight + at, mask=within, other=0.0).to(tl.float32)
    wide = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / width + eps)
    state = ((wide * scale).to(value.dtype).to(tl.float32) * factor).to(value.dtype)
    if part == 0:
        tl.store(total + token * width + at, value, mask=within)
        tl.store(normed + token * width + at, state, mask=within)
    found = tl.sum(rows.to(tl.float32) * state.to(tl.float32)[None, :], axis=1)
    tl.store(logits + token * experts + ids, found, mask=known)


@triton.jit
def _select_experts(
    logits,
    bias,
    topk_ids,
    topk_weights,
    experts,
    scaling,
    TOP_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_TOPK: tl.constexpr,
):
    token = tl.program_id(0) + tl.arange(0, 1)
    ids = tl.arange(0, BLOCK_N)
    found = tl.load(logits + token[:, None] * experts + ids[None, :], mask=(ids < experts)[None, :], other=0.0)
    _select(
        found, bias, topk_ids, topk_weights, token, token >= 0, experts, scaling, TOP_K, 1, BLOCK_N, BLOCK_TOPK
    )  # fmt: skip


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
    """See :func:`kimi_vl.kernels.reference.norm_router`. Of experts with equal scores the first is taken."""
    (tokens, width), experts, device = residual.shape, len(weight), residual.device
    residual, delta, weight = residual.contiguous(), delta.contiguous(), weight.contiguous()
    total, normed = torch.empty_like(residual), torch.empty_like(residual)
    topk_ids = torch.empty(tokens, top_k, dtype=torch.int32, device=device)
    topk_weights = torch.empty(tokens, top_k, dtype=torch.float32, device=device)
    columns, slots = max(16, triton.next_power_of_2(experts)), triton.next_power_of_2(top_k)
    if 0 < tokens <= FEW:
        block = triton.next_power_of_2(width)
        own = max(1, _TILE // block)  # experts of a program
        logits = torch.empty(tokens, experts, dtype=torch.float32, device=device)
        _norm_logits[(tokens, -(-experts // own))](
            residual, delta, norm_weight, weight, total, normed, logits, width, experts, eps,
            BLOCK_N=own, BLOCK_K=block, num_warps=4,
        )  # fmt: skip
        _select_experts[(tokens,)](
            logits, bias, topk_ids, topk_weights, experts, scaling,
            TOP_K=top_k, BLOCK_N=columns, BLOCK_TOPK=slots, num_warps=1,
        )  # fmt: skip
    elif tokens:
        _norm_router[(-(-tokens // _TOKENS),)](
            residual, delta, norm_weight, weight, bias, total, normed, topk_ids, topk_weights,
            tokens, width, experts, eps, scaling,
            TOP_K=top_k, BLOCK_M=_TOKENS, BLOCK_N=columns,
            # 256 bytes of each weight row at a time: with three loads in flight that is 48 KB for one program
            BLOCK_K=256 // weight.itemsize,
            BLOCK_TOPK=slots, num_warps=4, num_stages=4,
        )  # fmt: skip
    return total, normed, topk_ids, topk_weights
