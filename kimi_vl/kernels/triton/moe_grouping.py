"""Pairs of a token and an expert, sorted into blocks of one expert each, for the grouped GEMMs of the experts."""

# Options of a launch (num_warps and so on) are no parameters of a kernel.
# pyright: reportCallIssue=false
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


def most_blocks(tokens: int, top_k: int, experts: int, shared: int, block_m: int) -> int:
    """The most blocks of ``block_m`` pairs that any routing needs."""
    pairs = tokens * top_k
    first = min(
        pairs, experts
    )  # an expert's first block has at least one pair, and the blocks before its last are full
    return first + (pairs - first) // block_m + shared * -(-tokens // block_m)


def group(topk_ids: Tensor, sorted_pairs: Tensor, expert_ids: Tensor, experts: int, shared: int, block_m: int) -> None:
    """Fill ``sorted_pairs`` (blocks * block_m) and ``expert_ids`` (blocks), for the blocks that :func:`most_blocks`
    counts; see :func:`_group`."""
    tokens, top_k = topk_ids.shape
    chunk = 64
    placed = max(tokens * top_k, shared * -(-tokens // block_m) * block_m)
    _group[(-(-placed // chunk),)](
        topk_ids, sorted_pairs, expert_ids, tokens, top_k, top_k + shared, experts, expert_ids.numel(),
        BLOCK_M=block_m, BLOCK_E=triton.next_power_of_2(experts), CHUNK=chunk, COUNTED=256, num_warps=8,
    )  # fmt: skip


@triton.jit(do_not_specialize=["tokens", "blocks"])
def _group(
    topk_ids,
    sorted_pairs,
    expert_ids,
    tokens,
    top_k,
    slots,
    experts,
    blocks,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
    CHUNK: tl.constexpr,
    COUNTED: tl.constexpr,
):
    """Sorts pairs by expert: ``sorted_pairs`` gets the pairs of each block, padded with ``tokens * slots`` after an
    expert's last one, and ``expert_ids`` the expert of each block, -1 past the last block.

    Shared experts come first, since their pairs need no counting. Each program places CHUNK routed pairs, and counts
    all those before them itself, COUNTED at a time, in a counter for each of these and each expert: they are added up
    once, in the end. That is quadratic in the number of pairs, and still far less work than the GEMMs of a long
    prefill.
    """
    chunk = tl.program_id(0)
    routed, num_pairs = tokens * top_k, tokens * slots
    ids, here = tl.arange(0, BLOCK_E), tl.arange(0, CHUNK)
    found_before = tl.zeros((COUNTED, BLOCK_E), dtype=tl.int32)
    found = tl.zeros((COUNTED, BLOCK_E), dtype=tl.int32)
    for begin in range(0, routed, COUNTED):
        at = begin + tl.arange(0, COUNTED)
        expert = tl.load(topk_ids + at, mask=at < routed, other=-1)
        one = (expert[:, None] == ids[None, :]).to(tl.int32)
        found_before += tl.where((at < chunk * CHUNK)[:, None], one, 0)
        found += one
    before, counts = tl.sum(found_before, axis=0), tl.sum(found, axis=0)
    shared_blocks = tl.cdiv(tokens, BLOCK_M)
    shared_rows = shared_blocks * BLOCK_M * (slots - top_k)
    room = (counts + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    end = shared_rows + tl.cumsum(room, axis=0)
    start = end - room

    mine = chunk * CHUNK + here
    expert = tl.load(topk_ids + mine, mask=mine < routed, other=-1)
    earlier = (expert[None, :] == expert[:, None]) & (here[None, :] < here[:, None])
    rank = tl.sum(earlier.to(tl.int32), axis=1)
    first = tl.sum(tl.where(expert[:, None] == ids[None, :], (start + before)[None, :], 0), axis=1)
    pair = mine // top_k * slots + mine % top_k
    tl.store(sorted_pairs + first + rank, pair, mask=mine < routed)

    token = mine % (shared_blocks * BLOCK_M)
    slot = top_k + mine // (shared_blocks * BLOCK_M)
    tl.store(sorted_pairs + mine, tl.where(token < tokens, token * slots + slot, num_pairs), mask=mine < shared_rows)

    if chunk == 0:
        rows = tl.arange(0, BLOCK_M)
        spare = (start + counts)[:, None] + rows[None, :]  # (BLOCK_E, BLOCK_M)
        tl.store(
            sorted_pairs + spare, tl.zeros((BLOCK_E, BLOCK_M), dtype=tl.int32) + num_pairs, mask=spare < end[:, None]
        )
        for begin in range(0, blocks, CHUNK):
            block = begin + here
            row = block * BLOCK_M
            passed = tl.sum((end[None, :] <= row[:, None]).to(tl.int32), axis=1)
            expert = tl.where(row < shared_rows, experts + block // shared_blocks, passed)
            expert = tl.where(row < shared_rows + tl.sum(room, axis=0), expert, -1)
            tl.store(expert_ids + block, expert, mask=block < blocks)
