"""Mixture of experts in Triton: routed and shared experts, and their weighted sum.

A pair is a token and one of its experts, and is one row of both GEMMs. Shared experts count as experts that every
token selects. There are two paths:

- Few pairs, as in a decode step of one or two sequences: GEMVs. A program of the first kernel computes some columns of
  one pair, a program of the second some columns of one token: it loops over the token's experts in order and adds up
  their weighted outputs. Nothing is sorted.
- More pairs: grouped GEMMs. One kernel sorts the pairs by expert and pads each expert's to whole blocks; two GEMM
  kernels compute a tile of one block in each program; the last kernel adds up each token's weighted outputs in order.
  The grid is sized by the most blocks that the shapes allow, and programs past the last block return at once, so
  nothing synchronises with the host and the launches can be captured in a CUDA graph.

There are no atomics, so results are deterministic. With few tokens the memory traffic is 6 H I bytes in bfloat16 for
each expert that is selected. Long prefills are bound by compute; whether torch's ``grouped_mm`` is faster there differs
between GPUs: `scripts/bench_kernels` measures both.
"""

# Options of a launch (num_warps and so on) are no parameters of a kernel, and one kernel's call of another returns
# what the checker cannot know.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...quantization.weight import Weight
from .. import plain
from ..linear import mlp
from . import card
from .linear import first_group, groups_of, kernel_form, numbers, products, project, span, stored, weight_tile
from .moe_grouping import group, most_blocks


@dataclass(frozen=True)
class Tile:
    """How one GEMM is tiled: output columns of a program, inputs that it takes at a time, warps and pipeline stages."""

    block_n: int
    block_k: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Plan:
    """``block_m`` pairs of one expert make a block; 0 is the path of few pairs."""

    block_m: int
    gate_up: Tile
    down: Tile


# For bfloat16. A program has stages * block_k * 2 * (block_m + block_n) bytes of shared memory, with twice block_n for
# gate_up.
PAIRS = Plan(0, Tile(4, 0, 4, 1), Tile(4, 512, 4, 5))
FEW = Plan(16, Tile(64, 128, 4, 3), Tile(64, 128, 4, 4))
SOME = Plan(64, Tile(64, 64, 4, 4), Tile(128, 64, 4, 4))
MANY = Plan(128, Tile(128, 64, 8, 3), Tile(256, 64, 8, 3))
# For quantised weights, which are widened in registers.
INT4_PAIRS = Plan(0, Tile(8, 0, 4, 1), Tile(8, 512, 2, 5))
QUANTIZED_PAIRS = Plan(0, Tile(8, 0, 4, 1), Tile(8, 512, 4, 4))
INT4_FEW = Plan(16, Tile(64, 128, 4, 3), Tile(64, 128, 4, 3))
QUANTIZED_FEW = Plan(16, Tile(32, 256, 4, 3), Tile(32, 256, 4, 3))
QUANTIZED_SOME = Plan(64, Tile(64, 64, 8, 3), Tile(64, 64, 8, 3))
QUANTIZED_MANY = Plan(128, Tile(64, 64, 8, 3), Tile(128, 64, 8, 3))
# Correctness rather than speed: no tensor cores, and twice the shared memory.
FLOAT32 = Plan(16, Tile(32, 32, 4, 2), Tile(64, 32, 4, 2))


def choose_plan(
    tokens: int, top_k: int, experts: int, itemsize: int, bits: int = 16, shared_memory: int = card.H100_SHARED_MEMORY
) -> Plan:
    """By the pairs that an expert gets on average: while reading weights dominates, short blocks waste the least."""
    expected = tokens * top_k / experts
    if expected <= (1 / 4 if bits == 16 else 1 / 2):
        return {16: PAIRS, 8: QUANTIZED_PAIRS, 4: INT4_PAIRS}[bits]
    if itemsize != 2:
        return FLOAT32
    if expected <= 16:
        return {16: FEW, 8: QUANTIZED_FEW, 4: INT4_FEW}[bits]
    if bits == 16:
        return MANY if expected > 64 and card.is_wide(shared_memory) else SOME
    return QUANTIZED_SOME if expected <= 96 else QUANTIZED_MANY


@triton.jit
def _gate_and_up(expert, gate_up, shared_gate, shared_up, size, experts, SHARED: tl.constexpr):
    """Pointers to an expert's gate and up matrices, or to their scales, of ``size`` each. Shared experts have ids after
    the routed ones, and their own tensors."""
    gate = gate_up + expert * 2 * size
    up = gate + size
    if SHARED and expert >= experts:
        gate = shared_gate + (expert - experts) * size
        up = shared_up + (expert - experts) * size
    return gate, up


@triton.jit
def _silu(values):
    return values / (1.0 + tl.exp(-values))


# Few pairs: GEMVs


@triton.jit
def _pair_gate_up(
    states,
    topk_ids,
    gate_up,
    shared_gate,
    shared_up,
    scales,
    shared_gate_scales,
    shared_up_scales,
    hidden,
    top_k,
    slots,
    experts,
    width: tl.constexpr,
    inner: tl.constexpr,
    SHARED: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    WORDS: tl.constexpr = width % 8 == 0
    pair = tl.program_id(1)
    token, slot = pair // slots, pair % slots
    expert = tl.load(topk_ids + token * top_k + slot, mask=slot < top_k, other=0)
    expert = tl.where(slot < top_k, expert, experts + slot - top_k).to(tl.int64)
    size = inner * width // numbers(BITS)
    gate, up = _gate_and_up(expert, gate_up, shared_gate, shared_up, size, experts, SHARED)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    at = tl.arange(0, BLOCK_K)
    state = tl.load(states + token * width + at, mask=at < width, other=0.0).to(tl.float32)
    inside, size = columns < inner, inner * groups_of(width, GROUP)
    gate_scales, up_scales = _gate_and_up(expert, scales, shared_gate_scales, shared_up_scales, size, experts, SHARED)
    gates = products(
        gate, gate_scales, columns, inside, 0, width, width, state, BITS, GROUP, SPAN, BLOCK_N, BLOCK_K, WORDS
    )
    acc_gate = tl.sum(gates, axis=1)
    ups = products(up, up_scales, columns, inside, 0, width, width, state, BITS, GROUP, SPAN, BLOCK_N, BLOCK_K, WORDS)
    acc_up = tl.sum(ups, axis=1)
    if BITS < 16 and GROUP == 0:
        acc_gate *= tl.load(gate_scales + columns, mask=inside, other=0.0).to(tl.float32)
        acc_up *= tl.load(up_scales + columns, mask=inside, other=0.0).to(tl.float32)
    result = _silu(acc_gate) * acc_up
    tl.store(hidden + pair * inner + columns, result.to(hidden.dtype.element_ty), mask=inside)


@triton.jit
def _pair_down(
    hidden,
    topk_ids,
    topk_weights,
    down,
    shared_down,
    scales,
    shared_scales,
    out,
    top_k,
    slots,
    width: tl.constexpr,
    inner: tl.constexpr,
    shared_inner: tl.constexpr,
    SHARED: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_S: tl.constexpr,
    STAGES: tl.constexpr,
):
    WORDS: tl.constexpr = inner % 8 == 0
    token = tl.program_id(1)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = columns < width
    depth = tl.arange(0, BLOCK_K)
    steps = tl.cdiv(inner, BLOCK_K)  # of each expert
    acc = tl.zeros((BLOCK_N, BLOCK_K // SPAN), dtype=tl.float32)
    SCALED: tl.constexpr = BITS < 16 and GROUP == 0
    if SCALED:  # a scale for each expert and channel, read before the loop, whose pipeline takes no loads so narrow
        slots_here = tl.arange(0, BLOCK_S)[None, :]
        chosen = tl.load(topk_ids + token * top_k + slots_here, mask=slots_here < top_k, other=0).to(tl.int64)
        factors = tl.load(scales + chosen * width + columns[:, None], mask=inside[:, None], other=0.0).to(tl.float32)
    for step in tl.range(0, top_k * steps, num_stages=STAGES):
        slot, at = step // steps, step % steps * BLOCK_K + depth
        expert = tl.load(topk_ids + token * top_k + slot).to(tl.int64)
        weight = tl.load(topk_weights + token * top_k + slot)
        row = tl.load(hidden + (token * slots + slot) * inner + at, mask=at < inner, other=0.0).to(tl.float32)
        codes = down + expert * (width * inner // numbers(BITS))
        own = scales + expert * width * groups_of(inner, GROUP)
        begin = step % steps * BLOCK_K
        sums = products(
            codes, own, columns, inside, begin, inner, inner, row * weight, BITS, GROUP, SPAN, BLOCK_N, BLOCK_K, WORDS
        )
        if SCALED:
            sums *= tl.sum(tl.where(slots_here == slot, factors, 0.0), axis=1)[:, None]
        acc += sums
    if SHARED:
        if SCALED:
            factor = tl.load(shared_scales + columns, mask=inside, other=0.0).to(tl.float32)
        for step in tl.range(0, (slots - top_k) * steps, num_stages=STAGES):
            slot, at = step // steps, step % steps * BLOCK_K + depth
            row = tl.load(hidden + (token * slots + top_k + slot) * inner + at, mask=at < inner, other=0.0).to(
                tl.float32
            )
            codes = shared_down + slot * (inner // numbers(BITS))
            own = shared_scales + first_group(slot * inner, GROUP)
            begin = step % steps * BLOCK_K
            sums = products(
                codes, own, columns, inside, begin, inner, shared_inner, row, BITS, GROUP, SPAN, BLOCK_N, BLOCK_K, WORDS
            )
            if SCALED:
                sums *= factor[:, None]
            acc += sums
    result = tl.sum(acc, axis=1)
    tl.store(out + token * width + columns, result.to(out.dtype.element_ty), mask=inside)


# More pairs: grouped GEMMs over blocks


@triton.jit(do_not_specialize=["num_pairs"])
def _block_gate_up(
    states,
    sorted_pairs,
    expert_ids,
    gate_up,
    shared_gate,
    shared_up,
    scales,
    shared_gate_scales,
    shared_up_scales,
    hidden,
    num_pairs,
    slots,
    experts,
    width: tl.constexpr,
    inner: tl.constexpr,
    SHARED: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    block = tl.program_id(0)
    expert = tl.load(expert_ids + block).to(tl.int64)
    if expert < 0:
        return
    size = inner * width // numbers(BITS)
    gate, up = _gate_and_up(expert, gate_up, shared_gate, shared_up, size, experts, SHARED)
    size = inner * groups_of(width, GROUP)
    gate_scales, up_scales = _gate_and_up(expert, scales, shared_gate_scales, shared_up_scales, size, experts, SHARED)
    pair = tl.load(sorted_pairs + block * BLOCK_M + tl.arange(0, BLOCK_M))
    real = pair < num_pairs
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = columns < inner
    depth = tl.arange(0, BLOCK_K)
    state_place = (pair // slots).to(tl.int64)[:, None] * width + depth[None, :]
    acc_gate = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    acc_up = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for begin in range(0, width, BLOCK_K):
        within = begin + depth < width
        state = tl.load(states + begin + state_place, mask=real[:, None] & within[None, :], other=0.0)
        gates = weight_tile(gate, gate_scales, columns, inside, begin, width, width, BITS, GROUP, BLOCK_N, BLOCK_K)
        acc_gate = tl.dot(state, tl.trans(gates.to(state.dtype)), acc_gate, input_precision="ieee")
        ups = weight_tile(up, up_scales, columns, inside, begin, width, width, BITS, GROUP, BLOCK_N, BLOCK_K)
        acc_up = tl.dot(state, tl.trans(ups.to(state.dtype)), acc_up, input_precision="ieee")
    if BITS < 16 and GROUP == 0:
        acc_gate *= tl.load(gate_scales + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
        acc_up *= tl.load(up_scales + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    result = (_silu(acc_gate) * acc_up).to(hidden.dtype.element_ty)
    target = hidden + pair.to(tl.int64)[:, None] * inner + columns[None, :]
    tl.store(target, result, mask=real[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["num_pairs"])
def _block_down(
    hidden,
    sorted_pairs,
    expert_ids,
    down,
    shared_down,
    scales,
    shared_scales,
    outputs,
    num_pairs,
    experts,
    width: tl.constexpr,
    inner: tl.constexpr,
    shared_inner: tl.constexpr,
    SHARED: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    block = tl.program_id(0)
    expert = tl.load(expert_ids + block).to(tl.int64)
    if expert < 0:
        return
    matrix, stride = down + expert * (width * inner // numbers(BITS)), inner
    own = scales + expert * width * groups_of(inner, GROUP)
    if SHARED and expert >= experts:
        matrix, stride = shared_down + (expert - experts) * (inner // numbers(BITS)), shared_inner
        own = shared_scales + first_group((expert - experts) * inner, GROUP)
    pair = tl.load(sorted_pairs + block * BLOCK_M + tl.arange(0, BLOCK_M))
    real = pair < num_pairs
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = columns < width
    depth = tl.arange(0, BLOCK_K)
    row_place = pair.to(tl.int64)[:, None] * inner + depth[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for begin in range(0, inner, BLOCK_K):
        within = begin + depth < inner
        rows = tl.load(hidden + begin + row_place, mask=real[:, None] & within[None, :], other=0.0)
        values = weight_tile(matrix, own, columns, inside, begin, inner, stride, BITS, GROUP, BLOCK_N, BLOCK_K)
        acc = tl.dot(rows, tl.trans(values.to(rows.dtype)), acc, input_precision="ieee")
    if BITS < 16 and GROUP == 0:
        acc *= tl.load(own + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    target = outputs + pair.to(tl.int64)[:, None] * width + columns[None, :]
    tl.store(target, acc.to(outputs.dtype.element_ty), mask=real[:, None] & inside[None, :])


@triton.jit
def _combine(outputs, topk_weights, out, top_k, slots, width, BLOCK_N: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = columns < width
    acc = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for slot in range(0, slots):
        weight = tl.load(
            topk_weights + token * top_k + slot, mask=slot < top_k, other=1.0
        )  # shared experts are not scaled
        output = tl.load(outputs + (token * slots + slot) * width + columns, mask=inside, other=0.0)
        acc += output.to(tl.float32) * weight
    tl.store(out + token * width + columns, acc.to(out.dtype.element_ty), mask=inside)


def moe(
    states: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up: Weight,
    down: Weight,
    shared: tuple[Weight, Weight, Weight] | None = None,
    plan: Plan | None = None,
) -> Tensor:
    """See :func:`kimi_vl.kernels.reference.moe`; ``topk_ids`` is int32, ``topk_weights`` float32.

    ``shared`` are computed as experts that every token selects, so their width must be a multiple of a routed expert's.
    Their outputs are part of the float32 sum here, except where they are quantised in another way than the routed ones.
    """
    form = kernel_form(gate_up, down)
    if form is None:
        return plain.moe(states, topk_ids, topk_weights, gate_up, down, shared)
    if shared and kernel_form(*shared) != form:
        return moe(states, topk_ids, topk_weights, gate_up, down, None, plan) + mlp(states, shared, project=project)
    tokens, width = states.shape
    experts, _, inner = down.shape
    top_k = topk_ids.shape[1]
    gate, up, shared_down = shared or (gate_up, gate_up, down)
    shared_inner = shared_down.shape[-1] if shared else 0
    if shared_inner % inner or (shared and form[1] and inner % form[1]):
        raise ValueError(f"the shared experts' width {shared_inner} is no multiple of {inner}, a routed expert's")
    gate_up, gate_up_scales = stored(gate_up)
    down, down_scales = stored(down)
    gate, gate_scales = stored(gate)
    up, up_scales = stored(up)
    shared_down, shared_scales = stored(shared_down)
    if not all(each.is_contiguous() for each in (topk_ids, topk_weights, gate_up, down, gate, up, shared_down)):
        raise ValueError("topk_ids, topk_weights and weights must be contiguous")
    states = states.contiguous()
    out = torch.empty_like(states)
    if not tokens:
        return out
    slots = top_k + shared_inner // inner
    plan = plan or choose_plan(tokens, top_k, experts, states.itemsize, form[0], card.shared_memory(states.device))
    hidden = torch.empty(tokens * slots, inner, dtype=states.dtype, device=states.device)
    common = {"SHARED": shared is not None, "BITS": form[0], "GROUP": form[1]}
    if plan.block_m == 0:
        common["SPAN"] = span(*form)
        _pair_gate_up[(-(-inner // plan.gate_up.block_n), tokens * slots)](
            states, topk_ids, gate_up, gate, up, gate_up_scales, gate_scales, up_scales, hidden, top_k, slots, experts,
            width, inner, BLOCK_N=plan.gate_up.block_n, BLOCK_K=triton.next_power_of_2(width),
            num_warps=plan.gate_up.warps, **common,
        )  # fmt: skip
        _pair_down[(-(-width // plan.down.block_n), tokens)](
            hidden, topk_ids, topk_weights, down, shared_down, down_scales, shared_scales, out, top_k, slots, width,
            inner, shared_inner, BLOCK_N=plan.down.block_n,
            BLOCK_K=min(plan.down.block_k, triton.next_power_of_2(inner)), BLOCK_S=triton.next_power_of_2(top_k),
            STAGES=plan.down.stages, num_warps=plan.down.warps, **common,
        )  # fmt: skip
        return out
    block_m = plan.block_m
    blocks = most_blocks(tokens, top_k, experts, slots - top_k, block_m)
    sorted_pairs = torch.empty(blocks * block_m, dtype=torch.int32, device=states.device)
    expert_ids = torch.empty(blocks, dtype=torch.int32, device=states.device)
    group(topk_ids, sorted_pairs, expert_ids, experts, slots - top_k, block_m)
    _block_gate_up[(blocks, -(-inner // plan.gate_up.block_n))](
        states, sorted_pairs, expert_ids, gate_up, gate, up, gate_up_scales, gate_scales, up_scales, hidden,
        tokens * slots, slots, experts, width, inner, BLOCK_M=block_m, BLOCK_N=plan.gate_up.block_n,
        BLOCK_K=plan.gate_up.block_k, num_warps=plan.gate_up.warps, num_stages=plan.gate_up.stages, **common,
    )  # fmt: skip
    outputs = torch.empty(tokens * slots, width, dtype=states.dtype, device=states.device)
    _block_down[(blocks, -(-width // plan.down.block_n))](
        hidden, sorted_pairs, expert_ids, down, shared_down, down_scales, shared_scales, outputs, tokens * slots,
        experts, width, inner, shared_inner, BLOCK_M=block_m, BLOCK_N=plan.down.block_n, BLOCK_K=plan.down.block_k,
        num_warps=plan.down.warps, num_stages=plan.down.stages, **common,
    )  # fmt: skip
    columns = min(1024, triton.next_power_of_2(width))
    _combine[(tokens, -(-width // columns))](
        outputs, topk_weights, out, top_k, slots, width, BLOCK_N=columns, num_warps=4
    )
    return out
