"""GEMMs with quantised weights, whose numbers are widened in registers: what is read is what is stored.

A program computes a tile of some tokens and output channels. An integer is exact in bfloat16, and so is a number of
float8, which a GPU converts itself from compute capability 8.9 on; a scale of a whole
channel multiplies the sum, and those of groups the integers, which costs one rounding of each weight.
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

from ...quantization.weight import QuantizedWeight, Weight
from .. import linear


@dataclass(frozen=True)
class Plan:
    """Tokens, output channels and inputs a step of each program, its warps and pipeline stages."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


# While few tokens share a weight, many programs read it: the fewer channels each has, the more of them there are.
FEW = Plan(16, 16, 128, 4, 4)
SOME = Plan(32, 64, 128, 4, 3)
MANY = Plan(64, 128, 64, 8, 3)
# Correctness rather than speed: no tensor cores, and twice the shared memory.
FLOAT32 = Plan(16, 32, 64, 4, 2)


def choose_plan(tokens: int, itemsize: int) -> Plan:
    if itemsize != 2:
        return FLOAT32
    return FEW if tokens <= 16 else SOME if tokens <= 128 else MANY


@triton.jit
def numbers(BITS: tl.constexpr):
    """Numbers in an element of memory, which is a byte where they are quantised."""
    PER: tl.constexpr = 1 if BITS == 16 else 8 // BITS  # pyright: ignore[reportAssignmentType]
    return PER


@triton.jit
def groups_of(width, GROUP: tl.constexpr):
    """Scales of an output channel."""
    return width // GROUP if GROUP > 0 else 1


@triton.jit
def first_group(begin, GROUP: tl.constexpr):
    """Where the scales of inputs begin that begin in the midst of a channel."""
    return begin // GROUP if GROUP > 0 else 0


@triton.jit
def widened(codes):
    """Numbers of 8 bits as float32."""
    if codes.dtype == tl.float8e4nv:
        numbers = codes.to(tl.float32)
    else:
        numbers = (codes.to(tl.int32) - 128).to(tl.float32)
    return numbers


@triton.jit
def weight_tile(
    codes,
    scales,
    columns,
    inside,
    begin,
    limit,
    stride,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """(BLOCK_N, BLOCK_K): BLOCK_K inputs from ``begin`` on, of which there are ``limit``, of some output channels.

    ``stride`` inputs lie between channels. Of quantised weights they are float32, and with a ``GROUP`` of 0 not scaled
    yet; floating-point ones, with 16 BITS, are as they are stored.
    """
    PER: tl.constexpr = 1 if BITS == 16 else 8 // BITS  # pyright: ignore[reportAssignmentType]
    at = begin // PER + tl.arange(0, BLOCK_K // PER)
    mask = inside[:, None] & (at * PER < limit)[None, :]
    values = tl.load(codes + columns[:, None] * (stride // PER) + at[None, :], mask=mask, other=0.0)
    if BITS == 8:
        values = widened(values)
    if BITS == 4:
        values = (tl.interleave(values & 15, values >> 4).to(tl.int32) - 8).to(tl.float32)
    if GROUP > 0:
        if GROUP < BLOCK_K:
            groups = begin // GROUP + tl.arange(0, BLOCK_K // GROUP)
            mask = inside[:, None] & (groups * GROUP < limit)[None, :]
            found = tl.load(scales + columns[:, None] * (stride // GROUP) + groups[None, :], mask=mask, other=0.0)
            spread = tl.broadcast_to(found.to(tl.float32)[:, :, None], (BLOCK_N, BLOCK_K // GROUP, GROUP))
            values *= tl.reshape(spread, (BLOCK_N, BLOCK_K))
        else:
            found = tl.load(scales + columns * (stride // GROUP) + begin // GROUP, mask=inside, other=0.0)
            values *= found.to(tl.float32)[:, None]
    return values


@triton.jit
def scaled_tile(
    codes,
    scales,
    columns,
    inside,
    begin,
    limit,
    stride,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """:func:`weight_tile`, scaled also where a scale is for a whole channel."""
    values = weight_tile(codes, scales, columns, inside, begin, limit, stride, BITS, GROUP, BLOCK_N, BLOCK_K)
    if BITS < 16 and GROUP == 0:
        values *= tl.load(scales + columns, mask=inside, other=0.0).to(tl.float32)[:, None]
    return values


@triton.jit(do_not_specialize=["tokens"])
def _project(
    states,
    codes,
    scales,
    out,
    tokens,
    outputs,
    width,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    real, inside = rows < tokens, columns < outputs
    depth = tl.arange(0, BLOCK_K)
    place = rows.to(tl.int64)[:, None] * width + depth[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for begin in range(0, width, BLOCK_K):
        state = tl.load(states + begin + place, mask=real[:, None] & (begin + depth < width)[None, :], other=0.0)
        weight = weight_tile(codes, scales, columns, inside, begin, width, width, BITS, GROUP, BLOCK_N, BLOCK_K)
        acc = tl.dot(state, tl.trans(weight.to(state.dtype)), acc, input_precision="ieee")
    if GROUP == 0:
        acc *= tl.load(scales + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    target = out + rows.to(tl.int64)[:, None] * outputs + columns[None, :]
    tl.store(target, acc.to(out.dtype.element_ty), mask=real[:, None] & inside[None, :])


def kernel_form(*weights: Weight) -> tuple[int, int] | None:
    """Bits of all ``weights``, and the inputs that share a scale, of which 0 is all; 16 and 0 where they are
    floating-point. None where they differ, or the kernels do not take such groups."""
    forms = {_form(weight) for weight in weights}
    kinds = {None if isinstance(weight, Tensor) else weight.kind for weight in weights}
    return forms.pop() if len(forms) == len(kinds) == 1 else None


def _form(weight: Weight) -> tuple[int, int] | None:
    if isinstance(weight, Tensor):
        return 16, 0
    assert isinstance(weight, QuantizedWeight)
    size = weight.group
    if size == weight.shape[-1]:
        return weight.bits, 0
    return (weight.bits, size) if size >= 16 and size & size - 1 == 0 else None


def stored(weight: Weight) -> tuple[Tensor, Tensor]:
    """What kernels read of a weight: its values or codes, and its scales, if it has any."""
    if isinstance(weight, Tensor):
        return weight, weight
    assert isinstance(weight, QuantizedWeight)
    return weight.codes, weight.scales


def project(states: Tensor, weight: Weight, plan: Plan | None = None) -> Tensor:
    """See :func:`kimi_vl.kernels.linear.project`. Floating-point weights, and those in groups that the kernel does not
    take, are computed there."""
    form = kernel_form(weight)
    if not isinstance(weight, QuantizedWeight) or form is None:
        return linear.project(states, weight)
    outputs, width = weight.shape
    states = states.contiguous()
    tokens = states.numel() // width
    out = torch.empty(*states.shape[:-1], outputs, dtype=states.dtype, device=states.device)
    if not tokens:
        return out
    plan = plan or choose_plan(tokens, states.itemsize)
    _project[(-(-outputs // plan.block_n), -(-tokens // plan.block_m))](
        states, weight.codes, weight.scales, out, tokens, outputs, width, BITS=form[0], GROUP=form[1],
        BLOCK_M=plan.block_m, BLOCK_N=plan.block_n, BLOCK_K=plan.block_k, num_warps=plan.warps, num_stages=plan.stages,
    )  # fmt: skip
    return out
