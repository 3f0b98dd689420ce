"""Latent attention over pages: remembering new tokens, and answering one query a row.

A row's entries are split among programs (flash decoding): each goes through its share once, all heads of the row in
one tile, since they read the same latents; a second kernel joins the shares. How many programs there are follows from
shapes alone, so a captured graph stays valid while rows grow; how far each goes is decided from the lengths on the
device, so only pages in use cost anything. Joining goes in the order of the shares: the same lengths give the same
bits.

Bytes of a decoding step: 2 (R + P) a token in bfloat16, and 8 N R a share for the partial sums, written and read.
"""

# Options of a launch (num_warps and so on) are no parameters of a kernel.
# pyright: reportCallIssue=false
from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..cache import Rows

# Entries a program reads at least; fewer would cost more in partial sums than in entries.
LEAST_SHARE = 64
_PROGRAMS = 2  # for each multiprocessor
_JOINED = 16  # shares that the joining kernel reads at a time


@dataclass(frozen=True)
class Tile:
    """How a share is gone through: entries a step, warps and pipeline stages."""

    entries: int
    warps: int
    stages: int


# 36 KB of bfloat16 entries a step at the published widths. The compiler keeps one buffer up to four stages and two from
# five: then each of two programs a multiprocessor computes on one step while the next arrives.
BFLOAT16 = Tile(32, 4, 5)
FLOAT32 = Tile(16, 4, 3)


@triton.jit
def _latent_write(
    query,
    kv_a,
    norm_weight,
    cos,
    sin,
    entries,
    slots,
    turned,
    heads,
    query_token,
    query_head,
    turned_token,
    turned_head,
    kv_token,
    eps,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    ranks = tl.arange(0, BLOCK_R)
    latent_inside = (ranks < RANK) & (slot >= 0)
    latent = tl.load(kv_a + token * kv_token + ranks, mask=ranks < RANK, other=0.0)
    wide = latent.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / RANK + eps)
    factor = tl.load(norm_weight + ranks, mask=ranks < RANK, other=0.0).to(tl.float32)
    normed = (wide * scale).to(latent.dtype).to(tl.float32) * factor
    entry = entries + slot * (RANK + ROPE)
    tl.store(entry + ranks, normed.to(latent.dtype), mask=latent_inside)

    HALF: tl.constexpr = ROPE // 2
    pairs = tl.arange(0, BLOCK_P)
    inside = pairs < HALF
    # rows of a table: one half for the even components, one for the odd
    cos_even = tl.load(cos + token * ROPE + pairs, mask=inside, other=0.0).to(tl.float32)
    sin_even = tl.load(sin + token * ROPE + pairs, mask=inside, other=0.0).to(tl.float32)
    cos_odd = tl.load(cos + token * ROPE + HALF + pairs, mask=inside, other=0.0).to(tl.float32)
    sin_odd = tl.load(sin + token * ROPE + HALF + pairs, mask=inside, other=0.0).to(tl.float32)
    key = kv_a + token * kv_token + RANK
    key_even = tl.load(key + 2 * pairs, mask=inside, other=0.0).to(tl.float32)
    key_odd = tl.load(key + 2 * pairs + 1, mask=inside, other=0.0).to(tl.float32)
    kept = inside & (slot >= 0)
    tl.store(entry + RANK + pairs, (key_even * cos_even - key_odd * sin_even).to(latent.dtype), mask=kept)
    tl.store(entry + RANK + HALF + pairs, (key_odd * cos_odd + key_even * sin_odd).to(latent.dtype), mask=kept)

    for begin in range(0, heads, BLOCK_N):
        head = begin + tl.arange(0, BLOCK_N)
        shown = (head < heads)[:, None] & inside[None, :]
        source = query + token * query_token + head[:, None] * query_head + 2 * pairs[None, :]
        even = tl.load(source, mask=shown, other=0.0).to(tl.float32)  # (BLOCK_N, BLOCK_P)
        odd = tl.load(source + 1, mask=shown, other=0.0).to(tl.float32)
        target = turned + token * turned_token + head[:, None] * turned_head + pairs[None, :]
        tl.store(target, (even * cos_even[None, :] - odd * sin_even[None, :]).to(latent.dtype), mask=shown)
        tl.store(target + HALF, (odd * cos_odd[None, :] + even * sin_odd[None, :]).to(latent.dtype), mask=shown)


def latent_write(
    query_rope: Tensor,
    kv_a: Tensor,
    norm_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    entries: Tensor,
    slots: Tensor,
    eps: float,
    out: Tensor | None = None,
) -> Tensor:
    """See :func:`kimi_vl.kernels.reference.latent_write`. Inputs may be parts of wider tensors."""
    tokens, heads, rope = query_rope.shape
    rank = norm_weight.numel()
    turned = torch.empty(tokens, heads, rope, dtype=query_rope.dtype, device=query_rope.device) if out is None else out
    if not entries.is_contiguous() or query_rope.stride(-1) != 1 or kv_a.stride(-1) != 1 or turned.stride(-1) != 1:
        raise ValueError("entries must be contiguous, and so the last dimension of queries, kv_a and out")
    if tokens:
        _latent_write[(tokens,)](
            query_rope,
            kv_a,
            norm_weight,
            cos.contiguous(),
            sin.contiguous(),
            entries,
            slots,
            turned,
            heads,
            query_rope.stride(0),
            query_rope.stride(1),
            turned.stride(0),
            turned.stride(1),
            kv_a.stride(0),
            eps,
            RANK=rank,
            ROPE=rope,
            BLOCK_R=triton.next_power_of_2(rank),
            BLOCK_P=triton.next_power_of_2(rope // 2),
            BLOCK_N=min(16, triton.next_power_of_2(heads)),
            num_warps=4,
        )
    return turned


@triton.jit
def _share(length, splits, LEAST: tl.constexpr, BLOCK_L: tl.constexpr):
    """Entries of one program: all shares of a row together cover its length, in whole blocks."""
    return tl.maximum(tl.cdiv(tl.cdiv(length, splits), BLOCK_L) * BLOCK_L, LEAST)


@triton.jit(do_not_specialize=["table_row", "splits"])
def _decode_shares(
    query,
    entries,
    table,
    lengths,
    partial,
    weight,
    out,
    heads,
    query_row,
    query_head,
    table_row,
    splits,
    scale,
    PAGE: tl.constexpr,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_L: tl.constexpr,
    LEAST: tl.constexpr,
    ALONE: tl.constexpr,
):
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(2)
    head = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    length = tl.load(lengths + row)
    share = _share(length, splits, LEAST, BLOCK_L)
    begin = split * share
    end = tl.minimum(begin + share, length)
    # a share without entries leaves its partial sums as they are: nobody reads them
    if (begin < end) | ALONE:
        ranks, turns = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_P)
        in_rank, in_rope, real = ranks < RANK, turns < ROPE, head < heads
        first = query + row * query_row + head[:, None] * query_head
        query_latent = tl.load(first + ranks[None, :], mask=real[:, None] & in_rank[None, :], other=0.0)
        query_rope = tl.load(first + RANK + turns[None, :], mask=real[:, None] & in_rope[None, :], other=0.0)
        top = tl.full((BLOCK_N,), float("-inf"), dtype=tl.float32)
        total = tl.zeros((BLOCK_N,), dtype=tl.float32)
        mixed = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
        for start in range(begin, end, BLOCK_L):
            at = start + tl.arange(0, BLOCK_L)
            seen = at < end
            if PAGE % BLOCK_L == 0:  # a block never crosses pages, since shares are whole blocks
                page = tl.load(table + row * table_row + start // PAGE).to(tl.int64)
            else:
                page = tl.load(table + row * table_row + at // PAGE, mask=seen, other=0).to(tl.int64)
            entry = entries + (page * PAGE + at % PAGE) * (RANK + ROPE)
            latent = tl.load(
                entry[:, None] + ranks[None, :], mask=seen[:, None] & in_rank[None, :], other=0.0
            )  # (BLOCK_L, BLOCK_R): keys and values at once
            key = tl.load(entry[:, None] + RANK + turns[None, :], mask=seen[:, None] & in_rope[None, :], other=0.0)
            scores = tl.dot(query_rope, tl.trans(key), input_precision="ieee")
            scores = tl.dot(query_latent, tl.trans(latent), scores, input_precision="ieee")
            scores = tl.where(seen[None, :], scores * scale, float("-inf"))  # (BLOCK_N, BLOCK_L), in powers of two
            higher = tl.maximum(top, tl.max(scores, axis=1))
            fade = tl.exp2(top - higher)
            shares = tl.exp2(scores - higher[:, None])
            total = total * fade + tl.sum(shares, axis=1)
            mixed = tl.dot(shares.to(latent.dtype), latent, mixed * fade[:, None], input_precision="ieee")
            top = higher
        # nothing was seen only in a row of length 0
        mixed = mixed / tl.where(end > begin, total, 1.0)[:, None]
        kept = real[:, None] & in_rank[None, :]
        if ALONE:
            place = (row * heads + head)[:, None] * RANK + ranks[None, :]
            tl.store(out + place, mixed.to(out.dtype.element_ty), mask=kept)
        else:
            place = (row * splits + split) * heads + head
            tl.store(partial + place[:, None] * RANK + ranks[None, :], mixed, mask=kept)
            tl.store(weight + place, top + tl.log2(total), mask=real)


@triton.jit(do_not_specialize=["splits"])
def _decode_join(
    partial,
    weight,
    lengths,
    out,
    heads,
    splits,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_L: tl.constexpr,
    LEAST: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    ranks = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_rank = ranks < RANK
    length = tl.load(lengths + row)
    used = tl.cdiv(length, _share(length, splits, LEAST, BLOCK_L))
    top = tl.full((1,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((1,), dtype=tl.float32)
    mixed = tl.zeros((BLOCK_R,), dtype=tl.float32)
    for begin in range(0, used, BLOCK_S):
        split = begin + tl.arange(0, BLOCK_S)
        real = split < used
        place = (row * splits + split) * heads + head
        weights = tl.load(weight + place, mask=real, other=float("-inf"))
        parts = tl.load(
            partial + place[:, None] * RANK + ranks[None, :], mask=real[:, None] & in_rank[None, :], other=0.0
        )  # (BLOCK_S, BLOCK_R)
        higher = tl.maximum(top, tl.max(weights, axis=0))
        fade = tl.exp2(top - higher)
        shares = tl.exp2(weights - higher)
        total = total * fade + tl.sum(shares, axis=0)
        mixed = mixed * fade + tl.sum(parts * shares[:, None], axis=0)
        top = higher
    mixed = mixed / tl.where(used > 0, total, 1.0)
    tl.store(out + (row * heads + head) * RANK + ranks, mixed.to(out.dtype.element_ty), mask=in_rank)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    # Triton's interpreter, which has none, stands in for the published model's GPU
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def default_splits(rows: int, head_blocks: int, capacity: int, multiprocessors: int) -> int:
    """Shares of each row: enough programs to fill the machine, none with fewer than LEAST_SHARE of ``capacity``."""
    wanted = max(1, _PROGRAMS * multiprocessors // (rows * head_blocks))
    return max(1, min(wanted, -(-capacity // LEAST_SHARE)))


def mla_decode(
    query: Tensor,
    entries: Tensor,
    rows: Rows,
    scale: float,
    rank: int,
    splits: int = 0,
    tile: Tile | None = None,
) -> Tensor:
    """See :func:`kimi_vl.kernels.reference.mla_decode`.

    ``splits`` is how many programs share a row at most, 0 a number that suits the shapes; results differ with it by
    rounding.
    """
    table, lengths = rows.table, rows.lengths
    batch, heads, width = query.shape
    page_size, rope = entries.shape[1], width - rank
    if not entries.is_contiguous() or query.stride(-1) != 1 or table.stride(-1) != 1:
        raise ValueError("entries must be contiguous, and so the last dimension of queries and table")
    out = torch.empty(batch, heads, rank, dtype=query.dtype, device=query.device)
    if not batch:
        return out
    block_n = 16  # the least that tl.dot takes, and the heads of the published model
    head_blocks = -(-heads // block_n)
    tile = tile or (BFLOAT16 if query.itemsize == 2 else FLOAT32)
    if not splits:
        splits = default_splits(batch, head_blocks, table.shape[1] * page_size, _multiprocessors(query.device))
    alone = splits == 1
    partial = out if alone else torch.empty(batch, splits, heads, rank, dtype=torch.float32, device=query.device)
    weight = out if alone else torch.empty(batch, splits, heads, dtype=torch.float32, device=query.device)
    block_r = max(16, triton.next_power_of_2(rank))
    _decode_shares[(batch, head_blocks, splits)](
        query,
        entries,
        table,
        lengths,
        partial,
        weight,
        out,
        heads,
        query.stride(0),
        query.stride(1),
        table.stride(0),
        splits,
        scale * math.log2(math.e),
        PAGE=page_size,
        RANK=rank,
        ROPE=rope,
        BLOCK_N=block_n,
        BLOCK_R=block_r,
        BLOCK_P=max(16, triton.next_power_of_2(rope)),
        BLOCK_L=tile.entries,
        LEAST=LEAST_SHARE,
        ALONE=alone,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if not alone:
        block = min(128, block_r)
        _decode_join[(batch, heads, -(-rank // block))](
            partial,
            weight,
            lengths,
            out,
            heads,
            splits,
            RANK=rank,
            BLOCK_R=block,
            BLOCK_L=tile.entries,
            LEAST=LEAST_SHARE,
            BLOCK_S=_JOINED,
            num_warps=4,
        )
    return out
