"""Attention of a prompt's chunk: causal, over expanded keys and values, with an online softmax.

A program computes some queries of one head and reads the keys and values before them block by block. Keys stay where
they are, in two parts: the expanded one of each head and the rotary one that all heads share. Only the blocks at the
chunk's diagonal are masked. Programs with more keys are launched first, so that short ones fill the gaps at the end.

Memory traffic: each program reads (Q + P + V) values of every token that its last query attends to.
"""

# Options of a launch (num_warps and so on) are no parameters of a kernel, and one kernel's call of another returns
# what the checker cannot know.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..attention_metadata import PrefillChunk
from . import card


@dataclass(frozen=True)
class Plan:
    """Queries of a program, keys at a time, warps and pipeline stages."""

    block_m: int
    block_n: int
    warps: int
    stages: int


FEW = Plan(16, 64, 4, 3)
"""Up to 16 queries, the least that tl.dot takes."""
NARROW = Plan(128, 32, 8, 3)
"""For mma.sync, within 99 KB and 255 registers. With fewer queries than dims of a value, Triton would have all warps
share each query, and the softmax's sums go through shared memory."""
SOME = Plan(64, 64, 4, 3)
WIDE = Plan(128, 64, 8, 3)
"""Both are for wgmma and tcgen05: on an H100 the first is the faster one for 256 queries, the second for 1,024
(BENCHMARKS.md)."""
SOME_TOKENS = 256
FLOAT32 = Plan(16, 32, 8, 1)


def choose_plan(tokens: int, itemsize: int, shared_memory: int) -> Plan:
    """The plan for a chunk of so many tokens on a card whose programs may have ``shared_memory`` bytes."""
    if itemsize > 2:
        return FLOAT32
    if tokens <= FEW.block_m:
        return FEW
    if not card.is_wide(shared_memory):
        return NARROW
    return SOME if tokens <= SOME_TOKENS else WIDE


@triton.jit
def _attend_blocks(
    acc,
    l_i,
    m_i,
    query,
    turned,
    keys,
    rotary_keys,
    positions,
    begin,
    end,
    length,
    key_token,
    latent_token,
    scale,
    MASKED: tl.constexpr,
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    VALUE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """The online softmax over the keys ``begin`` to ``end``, in whole blocks; ``acc`` (BLOCK_M, BLOCK_V) is the sum of
    values, ``l_i`` that of weights, ``m_i`` the greatest score so far, in base 2 and scaled.

    With MASKED, a query at ``positions`` sees no key behind it, and nothing is read at or past ``length``.
    """
    columns = tl.arange(0, BLOCK_N)
    depth, turns, values = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_V)
    for start in range(begin, end, BLOCK_N):
        at = start + columns
        key_at = keys + at.to(tl.int64)[:, None] * key_token
        rotary_at = rotary_keys + at.to(tl.int64)[:, None] * latent_token + turns[None, :]
        if MASKED:
            there = (at < length)[:, None]
            key = tl.load(key_at + depth[None, :], mask=there & (depth < NOPE)[None, :], other=0.0)
            rotary = tl.load(rotary_at, mask=there & (turns < ROPE)[None, :], other=0.0)
        else:
            key = tl.load(key_at + depth[None, :], mask=(depth < NOPE)[None, :], other=0.0)  # (BLOCK_N, BLOCK_Q)
            rotary = tl.load(rotary_at, mask=(turns < ROPE)[None, :], other=0.0)  # (BLOCK_N, BLOCK_P)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee")
        scores = tl.dot(turned, tl.trans(rotary), scores, input_precision="ieee")  # (BLOCK_M, BLOCK_N)
        if MASKED:
            scores = tl.where(at[None, :] <= positions[:, None], scores, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(scores, axis=1) * scale)
        alpha = tl.exp2(m_i - m_new)
        p = tl.exp2(scores * scale - m_new[:, None])
        l_i = l_i * alpha + tl.sum(p, axis=1)
        value_at = key_at + NOPE + values[None, :]
        if MASKED:
            value = tl.load(value_at, mask=there & (values < VALUE)[None, :], other=0.0)
        else:
            value = tl.load(value_at, mask=(values < VALUE)[None, :], other=0.0)  # (BLOCK_N, BLOCK_V)
        acc = tl.dot(p.to(value.dtype), value, acc * alpha[:, None], input_precision="ieee")
        m_i = m_new
    return acc, l_i, m_i


@triton.jit(do_not_specialize=["tokens", "length"])
def _prefill(
    queries,
    rotated,
    latents,
    expanded,
    out,
    tokens,
    length,
    query_token,
    query_head,
    rotated_token,
    rotated_head,
    latent_token,
    key_token,
    key_head,
    out_token,
    scale,
    RANK: tl.constexpr,
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    VALUE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    # from the end: the last queries attend to most
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)
    token, real = rows.to(tl.int64)[:, None], (rows < tokens)[:, None]
    depth, turns, values = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_V)
    place = queries + token * query_token + head * query_head + depth[None, :]
    query = tl.load(place, mask=real & (depth < NOPE)[None, :], other=0.0)  # (BLOCK_M, BLOCK_Q)
    place = rotated + token * rotated_token + head * rotated_head + turns[None, :]
    turned = tl.load(place, mask=real & (turns < ROPE)[None, :], other=0.0)  # (BLOCK_M, BLOCK_P)
    acc = tl.zeros((BLOCK_M, BLOCK_V), dtype=tl.float32)
    l_i = tl.zeros((BLOCK_M,), dtype=tl.float32)
    m_i = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    past = length - tokens
    keys, rotary_keys = expanded + head * key_head, latents + RANK
    seen = (past + first + 1) // BLOCK_N * BLOCK_N  # keys in whole blocks that all of these queries attend to
    end = tl.minimum(past + first + BLOCK_M, length)
    acc, l_i, m_i = _attend_blocks(
        acc, l_i, m_i, query, turned, keys, rotary_keys, past + rows, 0, seen, length, key_token, latent_token, scale,
        False, NOPE, ROPE, VALUE, BLOCK_N, BLOCK_Q, BLOCK_P, BLOCK_V,
    )  # fmt: skip
    acc, l_i, m_i = _attend_blocks(
        acc, l_i, m_i, query, turned, keys, rotary_keys, past + rows, seen, end, length, key_token, latent_token, scale,
        True, NOPE, ROPE, VALUE, BLOCK_N, BLOCK_Q, BLOCK_P, BLOCK_V,
    )  # fmt: skip
    acc = acc / l_i[:, None]  # every query attends to itself
    place = out + token * out_token + head * VALUE + values[None, :]
    tl.store(place, acc.to(out.dtype.element_ty), mask=real & (values < VALUE)[None, :])


def mla_prefill(
    query: Tensor,
    rotated: Tensor,
    latents: Tensor,
    expanded: Tensor,
    chunk: PrefillChunk,
    scale: float,
    plan: Plan | None = None,
) -> Tensor:
    """See :func:`kimi_vl.kernels.reference.mla_prefill`. ``chunk`` is not read: its mask is never made."""
    (tokens, heads, nope), rope, length = query.shape, rotated.shape[-1], len(expanded)
    value = expanded.shape[-1] - nope
    if any(states.stride(-1) != 1 for states in (query, rotated, latents, expanded)):
        raise ValueError("the last dimension of queries, latents, keys and values must be contiguous")
    out = torch.empty(tokens, heads, value, dtype=query.dtype, device=query.device)
    if not tokens:
        return out
    plan = plan or choose_plan(tokens, query.itemsize, card.shared_memory(query.device))
    _prefill[(heads, -(-tokens // plan.block_m))](
        query, rotated, latents, expanded, out, tokens, length, *query.stride()[:2], *rotated.stride()[:2],
        latents.stride(0), *expanded.stride()[:2], heads * value, scale * math.log2(math.e),
        RANK=latents.shape[-1] - rope, NOPE=nope, ROPE=rope, VALUE=value, BLOCK_M=plan.block_m, BLOCK_N=plan.block_n,
        BLOCK_Q=max(16, triton.next_power_of_2(nope)), BLOCK_P=max(16, triton.next_power_of_2(rope)),
        BLOCK_V=max(16, triton.next_power_of_2(value)), num_warps=plan.warps, num_stages=plan.stages,
    )  # fmt: skip
    return out
