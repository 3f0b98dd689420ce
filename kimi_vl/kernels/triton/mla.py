"""Latent attention over a paged KV cache in three kernels: prepare, split-KV decode, combine.

The first writes the new tokens to the KV cache (norm and rotary embedding), rotates the queries and moves those of
decoding sequences into the latent space. The second is flash decoding: a sequence's cached tokens are split among
programs, and each reads its split once for all heads, since heads share the latents. The third combines the splits and
moves the result out of the latent space.

Grids follow from shapes alone, so a captured graph stays valid while sequences grow; each program takes its range from
``seq_lens`` on the device, so only pages in use are read. Splits are combined in order, so equal lengths give equal
bits.

Memory traffic of a decode step: 2 (R + P) bytes a cached token in bfloat16, 2 N R (Q + V) for both halves of
``kv_b_proj``, or half of that where these have 8 bits, and 8 N R for the partial sums of each split, written and read.
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

from ...quantization.weight import QuantizedWeight, Weight
from ..attention_metadata import DecodeMetadata
from . import card
from .linear import stored, widened

# The least cached tokens of a split: with fewer, the partial sums would be more bytes than the tokens.
MIN_SPLIT_LEN = 64
_PROGRAMS = 2  # for each multiprocessor
_TOKENS = 16  # the least that tl.dot takes
_ABSORBED = 64  # columns of a head's absorbed query in one program: 128 programs at the published widths
_ONE_BY_ONE = 4  # up to so many sequences, each is combined by programs of its own
_COMBINED = 16  # the most splits of each of more sequences


@dataclass(frozen=True)
class Tile:
    """How a split is read: cached tokens at a time, warps and pipeline stages."""

    block_n: int
    warps: int
    stages: int


# 32 cached tokens are 36 KB in bfloat16 at the published widths. Triton allocates one buffer up to four stages and two
# from five on: then each of the two programs of a multiprocessor computes on one buffer while it loads the other.
BFLOAT16 = Tile(32, 4, 5)
FLOAT32 = Tile(16, 4, 3)


@triton.jit
def _rotated(even, odd, table, pairs, inside, HALF: tl.constexpr):
    """Rotary embedding of the pairs (even, odd) of the last dimension: (first half, second half) of the result.

    ``table`` (…, 1) points to a token's cosines, then sines; the first half of each is for ``even``, the second for
    ``odd``.
    """
    cos_even = tl.load(table + pairs, mask=inside, other=0.0).to(tl.float32)
    cos_odd = tl.load(table + HALF + pairs, mask=inside, other=0.0).to(tl.float32)
    sin_even = tl.load(table + 2 * HALF + pairs, mask=inside, other=0.0).to(tl.float32)
    sin_odd = tl.load(table + 3 * HALF + pairs, mask=inside, other=0.0).to(tl.float32)
    return even * cos_even - odd * sin_even, odd * cos_odd + even * sin_odd


@triton.jit(do_not_specialize=["tokens", "decoding"])
def _prepare(
    joined,
    to_key,
    norm_weight,
    rope,
    kv_cache,
    slot_mapping,
    absorbed,
    rotated,
    tokens,
    decoding,
    heads,
    nope,
    joined_token,
    key_head,
    key_rank,
    key_nope,
    key_scales,
    scales_head,
    eps,
    QUANTIZED: tl.constexpr,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """A program has one of three tasks for a block of tokens: write their latents and rotary keys, rotate one head's
    queries, or compute some columns of one head's absorbed queries. The tasks that every step has come first."""
    task = tl.program_id(0)
    tokens_here = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    real = tokens_here < tokens
    token = tokens_here.to(tl.int64)[:, None]
    HALF: tl.constexpr = ROPE // 2
    pairs = tl.arange(0, BLOCK_P)[None, :]
    inside = real[:, None] & (pairs < HALF)
    table = rope + token * (2 * ROPE)
    if task == 0:
        slot = tl.load(slot_mapping + tokens_here, mask=real, other=-1).to(tl.int64)[:, None]
        ranks = tl.arange(0, BLOCK_R)[None, :]
        source = joined + token * joined_token + heads * (nope + ROPE)
        latent = tl.load(source + ranks, mask=real[:, None] & (ranks < RANK), other=0.0)  # (BLOCK_M, BLOCK_R)
        wide = latent.to(tl.float32)
        scale = tl.rsqrt(tl.sum(wide * wide, axis=1) / RANK + eps)[:, None]
        factor = tl.load(norm_weight + ranks, mask=ranks < RANK, other=0.0).to(tl.float32)
        normed = ((wide * scale).to(latent.dtype).to(tl.float32) * factor).to(latent.dtype)
        target = kv_cache + slot * (RANK + ROPE)
        tl.store(target + ranks, normed, mask=(slot >= 0) & (ranks < RANK))
        even = tl.load(source + RANK + 2 * pairs, mask=inside, other=0.0).to(tl.float32)
        odd = tl.load(source + RANK + 2 * pairs + 1, mask=inside, other=0.0).to(tl.float32)
        first, second = _rotated(even, odd, table, pairs, inside, HALF)
        tl.store(target + RANK + pairs, first.to(latent.dtype), mask=(slot >= 0) & inside)
        tl.store(target + RANK + HALF + pairs, second.to(latent.dtype), mask=(slot >= 0) & inside)
    elif task <= heads:
        head = task - 1
        source = joined + token * joined_token + head * (nope + ROPE) + nope
        even = tl.load(source + 2 * pairs, mask=inside, other=0.0).to(tl.float32)
        odd = tl.load(source + 2 * pairs + 1, mask=inside, other=0.0).to(tl.float32)
        first, second = _rotated(even, odd, table, pairs, inside, HALF)
        first, second = first.to(joined.dtype.element_ty), second.to(joined.dtype.element_ty)
        decodes = token < decoding
        target = absorbed + (token * heads + head) * (RANK + ROPE) + RANK
        tl.store(target + pairs, first, mask=inside & decodes)
        tl.store(target + HALF + pairs, second, mask=inside & decodes)
        target = rotated + ((token - decoding) * heads + head) * ROPE
        tl.store(target + pairs, first, mask=inside & (token >= decoding))
        tl.store(target + HALF + pairs, second, mask=inside & (token >= decoding))
    elif tl.program_id(1) * BLOCK_M < decoding:
        blocks = tl.cdiv(RANK, BLOCK_N)
        head = (task - heads - 1) // blocks
        columns = (task - heads - 1) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        depth = tl.arange(0, BLOCK_K)
        shown = (tokens_here < decoding)[:, None]
        source = joined + token * joined_token + head * (nope + ROPE)
        query = tl.load(source + depth[None, :], mask=shown & (depth < nope)[None, :], other=0.0)
        place = head * key_head + columns * key_rank + depth[:, None] * key_nope
        weight = tl.load(to_key + place, mask=(depth < nope)[:, None] & (columns < RANK), other=0.0)
        if QUANTIZED:
            factor = tl.load(key_scales + head * scales_head + depth, mask=depth < nope, other=0.0).to(tl.float32)
            weight = (widened(weight) * factor[:, None]).to(query.dtype)
        output = tl.dot(query, weight, input_precision="ieee")  # (BLOCK_M, BLOCK_N)
        target = absorbed + (token * heads + head) * (RANK + ROPE) + columns
        tl.store(target, output.to(absorbed.dtype.element_ty), mask=shown & (columns < RANK))


def mla_prepare(
    joined: Tensor,
    to_key: Weight,
    norm_weight: Tensor,
    rope: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    eps: float,
    decoding: int,
) -> tuple[Tensor, Tensor]:
    """See :func:`kimi_vl.kernels.reference.mla_prepare`."""
    quantized = isinstance(to_key, QuantizedWeight)
    key, key_scales = stored(to_key)
    key = key.transpose(1, 2) if quantized else key
    tokens, (heads, rank, nope) = len(joined), key.shape
    rope_dims = rope.shape[-1] // 2
    if not kv_cache.is_contiguous() or not rope.is_contiguous() or joined.stride(-1) != 1:
        raise ValueError("kv_cache and rope must be contiguous, and so the last dimension of joined")
    absorbed = torch.empty(decoding, heads, rank + rope_dims, dtype=joined.dtype, device=joined.device)
    rotated = torch.empty(tokens - decoding, heads, rope_dims, dtype=joined.dtype, device=joined.device)
    if tokens:
        absorbing = heads * -(-rank // _ABSORBED) if decoding else 0
        _prepare[(1 + heads + absorbing, -(-tokens // _TOKENS))](
            joined, key, norm_weight, rope, kv_cache, slot_mapping, absorbed, rotated, tokens, decoding, heads, nope,
            joined.stride(0), *key.stride(), key_scales, key_scales.stride(0), eps, QUANTIZED=quantized, RANK=rank,
            ROPE=rope_dims, BLOCK_M=_TOKENS, BLOCK_K=max(16, triton.next_power_of_2(nope)), BLOCK_N=_ABSORBED,
            BLOCK_R=triton.next_power_of_2(rank), BLOCK_P=triton.next_power_of_2(rope_dims // 2), num_warps=4,
        )  # fmt: skip
    return absorbed, rotated


@triton.jit
def _split_len(length, splits, MIN_SPLIT: tl.constexpr, BLOCK_N: tl.constexpr):
    """Cached tokens of one split, in whole blocks; all splits of a sequence together cover its length."""
    return tl.maximum(tl.cdiv(tl.cdiv(length, splits), BLOCK_N) * BLOCK_N, MIN_SPLIT)


@triton.jit(do_not_specialize=["page_table_seq", "splits"])
def _decode_split_kv(
    query,
    kv_cache,
    page_table,
    seq_lens,
    partial,
    lse,
    heads,
    query_seq,
    query_head,
    page_table_seq,
    splits,
    scale,
    PAGE: tl.constexpr,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    SINGLE_SPLIT: tl.constexpr,
):
    seq, split = tl.program_id(0).to(tl.int64), tl.program_id(2)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    length = tl.load(seq_lens + seq)
    split_len = _split_len(length, splits, MIN_SPLIT, BLOCK_N)
    begin = split * split_len
    end = tl.minimum(begin + split_len, length)
    # the partial sums of a split without tokens are never read
    if (begin < end) | SINGLE_SPLIT:
        ranks, turns = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_P)
        in_rank, in_rope, real = ranks < RANK, turns < ROPE, head < heads
        first = query + seq * query_seq + head[:, None] * query_head
        query_latent = tl.load(first + ranks[None, :], mask=real[:, None] & in_rank[None, :], other=0.0)
        query_rope = tl.load(first + RANK + turns[None, :], mask=real[:, None] & in_rope[None, :], other=0.0)
        m_i = tl.full((BLOCK_H,), float("-inf"), dtype=tl.float32)
        l_i = tl.zeros((BLOCK_H,), dtype=tl.float32)
        acc = tl.zeros((BLOCK_H, BLOCK_R), dtype=tl.float32)
        for start in range(begin, end, BLOCK_N):
            at = start + tl.arange(0, BLOCK_N)
            seen = at < end
            if PAGE % BLOCK_N == 0:  # splits are whole blocks, so none crosses a page
                page = tl.load(page_table + seq * page_table_seq + start // PAGE).to(tl.int64)
            else:
                page = tl.load(page_table + seq * page_table_seq + at // PAGE, mask=seen, other=0).to(tl.int64)
            cached = kv_cache + (page * PAGE + at % PAGE) * (RANK + ROPE)
            latent = tl.load(
                cached[:, None] + ranks[None, :], mask=seen[:, None] & in_rank[None, :], other=0.0
            )  # (BLOCK_N, BLOCK_R), both keys and values
            key = tl.load(cached[:, None] + RANK + turns[None, :], mask=seen[:, None] & in_rope[None, :], other=0.0)
            scores = tl.dot(query_rope, tl.trans(key), input_precision="ieee")
            scores = tl.dot(query_latent, tl.trans(latent), scores, input_precision="ieee")
            scores = tl.where(seen[None, :], scores * scale, float("-inf"))  # (BLOCK_H, BLOCK_N), base 2
            m_new = tl.maximum(m_i, tl.max(scores, axis=1))
            alpha = tl.exp2(m_i - m_new)
            p = tl.exp2(scores - m_new[:, None])
            l_i = l_i * alpha + tl.sum(p, axis=1)
            acc = tl.dot(p.to(latent.dtype), latent, acc * alpha[:, None], input_precision="ieee")
            m_i = m_new
        # only a sequence of length 0 attends to nothing
        acc = acc / tl.where(end > begin, l_i, 1.0)[:, None]
        kept = real[:, None] & in_rank[None, :]
        if SINGLE_SPLIT:
            place = (seq * heads + head)[:, None] * RANK + ranks[None, :]
            tl.store(partial + place, acc.to(partial.dtype.element_ty), mask=kept)
        else:
            place = (seq * splits + split) * heads + head
            tl.store(partial + place[:, None] * RANK + ranks[None, :], acc, mask=kept)
            tl.store(lse + place, m_i + tl.log2(l_i), mask=real)


@triton.jit(do_not_specialize=["batch", "splits"])
def _decode_combine(
    partial,
    lse,
    seq_lens,
    to_value,
    out,
    batch,
    heads,
    values,
    splits,
    value_head,
    value_column,
    value_rank,
    value_scales,
    scales_head,
    QUANTIZED: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    SINGLE_SPLIT: tl.constexpr,
):
    """Combines the splits of some sequences for one head, and moves the result out of the latent space."""
    seqs = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    head = tl.program_id(1)
    columns = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    ranks = tl.arange(0, BLOCK_R)
    real, in_rank, inside = seqs < batch, ranks < RANK, columns < values
    seq = seqs.to(tl.int64)
    if SINGLE_SPLIT:
        place = (seq * heads + head)[:, None] * RANK + ranks[None, :]
        latent = tl.load(partial + place, mask=real[:, None] & in_rank[None, :], other=0.0)
    else:
        length = tl.load(seq_lens + seqs, mask=real, other=0)
        used = tl.cdiv(length, _split_len(length, splits, MIN_SPLIT, BLOCK_N))  # (BLOCK_B)
        m_i = tl.full((BLOCK_B,), float("-inf"), dtype=tl.float32)
        l_i = tl.zeros((BLOCK_B,), dtype=tl.float32)
        acc = tl.zeros((BLOCK_B, BLOCK_R), dtype=tl.float32)
        for split in range(0, tl.max(used, axis=0)):
            there = split < used
            place = (seq * splits + split) * heads + head
            # a split without tokens must not change anything, not even the maximum
            log = tl.load(lse + place, mask=there, other=float("-inf"))
            part = tl.load(
                partial + place[:, None] * RANK + ranks[None, :], mask=there[:, None] & in_rank[None, :], other=0.0
            )  # (BLOCK_B, BLOCK_R)
            m_new = tl.where(there, tl.maximum(m_i, log), m_i)
            alpha = tl.where(there, tl.exp2(m_i - m_new), 1.0)
            p = tl.where(there, tl.exp2(log - m_new), 0.0)
            l_i = l_i * alpha + p
            acc = acc * alpha[:, None] + part * p[:, None]
            m_i = m_new
        latent = (acc / tl.where(used > 0, l_i, 1.0)[:, None]).to(out.dtype.element_ty)
    place = columns[:, None] * value_column + ranks[None, :] * value_rank
    weight = tl.load(to_value + head * value_head + place, mask=inside[:, None] & in_rank[None, :], other=0.0)
    if QUANTIZED:
        weight = widened(weight).to(latent.dtype)
    if BLOCK_B == 1:  # tl.dot takes at least 16
        output = tl.sum(weight.to(tl.float32) * latent.to(tl.float32), axis=1)[None, :]
    else:
        output = tl.dot(latent, tl.trans(weight), input_precision="ieee")
    if QUANTIZED:
        factor = tl.load(value_scales + head * scales_head + columns, mask=inside, other=0.0)
        output *= factor.to(tl.float32)[None, :]
    place = (seq * heads + head)[:, None] * values + columns[None, :]
    tl.store(out + place, output.to(out.dtype.element_ty), mask=real[:, None] & inside[None, :])


def default_splits(sequences: int, head_blocks: int, capacity: int, multiprocessors: int) -> int:
    """Splits of each sequence: enough programs to fill the GPU, and none with fewer than MIN_SPLIT_LEN of the
    ``capacity`` tokens of the page table. Those of several sequences are combined by fewer programs, one split after
    another, which takes longer than more splits save."""
    wanted = max(1, _PROGRAMS * multiprocessors // (sequences * head_blocks))
    if sequences > _ONE_BY_ONE:
        wanted = min(wanted, _COMBINED)
    return max(1, min(wanted, -(-capacity // MIN_SPLIT_LEN)))


def mla_decode(
    query: Tensor,
    kv_cache: Tensor,
    decode: DecodeMetadata,
    scale: float,
    to_value: Weight,
    splits: int = 0,
    tile: Tile | None = None,
) -> Tensor:
    """See :func:`kimi_vl.kernels.reference.mla_decode`.

    ``splits`` is into how many a sequence is split at most; 0 picks a number from the shapes. Results of different
    numbers differ by rounding.
    """
    page_table, seq_lens = decode.page_table, decode.seq_lens
    (batch, heads, width), (values, rank) = query.shape, to_value.shape[1:]
    page_size, rope = kv_cache.shape[1], width - rank
    if not kv_cache.is_contiguous() or query.stride(-1) != 1 or page_table.stride(-1) != 1:
        raise ValueError("kv_cache must be contiguous, and so the last dimension of queries and page table")
    out = torch.empty(batch, heads, values, dtype=query.dtype, device=query.device)
    if not batch:
        return out
    block_h = 16  # the least that tl.dot takes, and the heads of the published model
    head_blocks = -(-heads // block_h)
    tile = tile or (BFLOAT16 if query.itemsize == 2 else FLOAT32)
    if not splits:
        splits = default_splits(batch, head_blocks, page_table.shape[1] * page_size, card.multiprocessors(query.device))
    single = splits == 1
    # partial sums of the splits; of a single one the result
    partial = torch.empty(
        (batch, splits, heads, rank), dtype=query.dtype if single else torch.float32, device=query.device
    )
    lse = partial if single else torch.empty(batch, splits, heads, dtype=torch.float32, device=query.device)
    block_r = max(16, triton.next_power_of_2(rank))
    _decode_split_kv[(batch, head_blocks, splits)](
        query,
        kv_cache,
        page_table,
        seq_lens,
        partial,
        lse,
        heads,
        query.stride(0),
        query.stride(1),
        page_table.stride(0),
        splits,
        scale * math.log2(math.e),
        PAGE=page_size,
        RANK=rank,
        ROPE=rope,
        BLOCK_H=block_h,
        BLOCK_R=block_r,
        BLOCK_P=max(16, triton.next_power_of_2(rope)),
        BLOCK_N=tile.block_n,
        MIN_SPLIT=MIN_SPLIT_LEN,
        SINGLE_SPLIT=single,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    block_b = 1 if batch <= _ONE_BY_ONE else 16
    block_v = 64 // query.itemsize
    value, value_scales = stored(to_value)
    _decode_combine[(-(-batch // block_b), heads, -(-values // block_v))](
        partial, lse, seq_lens, value, out, batch, heads, values, splits, *value.stride(), value_scales,
        value_scales.stride(0), QUANTIZED=isinstance(to_value, QuantizedWeight), RANK=rank, BLOCK_B=block_b,
        BLOCK_R=block_r, BLOCK_V=block_v, BLOCK_N=tile.block_n, MIN_SPLIT=MIN_SPLIT_LEN, SINGLE_SPLIT=single,
        num_warps=4,
    )  # fmt: skip
    return out
