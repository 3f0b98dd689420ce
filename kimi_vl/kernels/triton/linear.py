"""GEMMs with quantised weights, whose numbers are widened in registers: what is read is what is stored.

A program computes a tile of some tokens and output channels. Projections of one token, and the experts of few, are sums
of products without tensor cores. Masks and offsets are such that the compiler finds out how many bytes lie together:
then a thread loads up to 16 at a time, and loads are pipelined, which takes at least 4.

An integer is exact in bfloat16, and so is a number of float8, which a GPU converts itself from compute capability 8.9
on; a scale of a whole channel multiplies the sum, and those of groups the integers, or sums of a group's products.
A scaled integer is rounded once before it enters a tensor core.
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
from .. import Form, linear


@dataclass(frozen=True)
class Plan:
    """Tokens, output channels and inputs a step of each program, its warps and pipeline stages; with 0 tokens, each
    program computes one token's products without tensor cores."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


# While few tokens share a weight, many programs read it: the fewer channels each has, the more of them there are.
# Measured on an H100 (BENCHMARKS.md) are those of up to 16 tokens.
INT4_VECTOR = Plan(0, 8, 2048, 4, 3)
VECTOR = Plan(0, 4, 2048, 4, 3)
FEW = Plan(16, 16, 256, 2, 5)
SOME = Plan(32, 64, 128, 4, 3)
MANY = Plan(64, 128, 64, 8, 3)
# Correctness rather than speed: no tensor cores, and twice the shared memory.
FLOAT32 = Plan(16, 32, 64, 4, 2)


def choose_plan(tokens: int, itemsize: int, bits: int) -> Plan:
    if itemsize != 2:
        return FLOAT32
    if tokens == 1:
        return INT4_VECTOR if bits == 4 else VECTOR
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
    """Numbers of 8 bits as float32; codes of integers become the last bits of a mantissa, so that none is converted."""
    if codes.dtype == tl.float8e4nv:
        numbers = codes.to(tl.float32)
    else:
        numbers = (codes.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388736.0
    return numbers


@triton.jit
def _nibble(bits):
    """The integers as float32 whose codes of 4 bits begin at bit 19 of ``bits``: they become the first bits of the
    mantissa of a number between 16 and 32, so that nothing is converted."""
    return ((bits & 0x780000) | 0x41800000).to(tl.float32, bitcast=True) - 24.0


@triton.jit
def _field(words, FIRST: tl.constexpr, BITS: tl.constexpr):
    """The codes of BITS bits from bit FIRST on, times 2^FIRST, as float32."""
    MASK: tl.constexpr = 15 if BITS == 4 else 255  # pyright: ignore[reportAssignmentType]
    return (words & (MASK << FIRST)).to(tl.float32)


@triton.jit
def _fields(words, BITS: tl.constexpr):
    """(BLOCK_N, BLOCK_K), float32: the codes of words (BLOCK_N, BLOCK_K * BITS / 32) in their order, each times two to
    the power of the bit that it begins at, since nothing is shifted."""
    if BITS == 4:
        evens = tl.interleave(
            tl.interleave(_field(words, 0, 4), _field(words, 16, 4)),
            tl.interleave(_field(words, 8, 4), _field(words, 24, 4)),
        )
        odds = tl.interleave(
            tl.interleave(_field(words, 4, 4), _field(words, 20, 4)),
            tl.interleave(_field(words, 12, 4), _field(words, 28, 4)),
        )
    else:
        evens = tl.interleave(_field(words, 0, 8), _field(words, 16, 8))
        odds = tl.interleave(_field(words, 8, 8), _field(words, 24, 8))
    return tl.interleave(evens, odds)


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
    mask = inside[:, None] & (at < limit // PER)[None, :]
    values = tl.load(codes + columns[:, None] * (stride // PER) + at[None, :], mask=mask, other=0.0)
    if BITS == 8:
        values = widened(values)
    if BITS == 4:
        values = tl.interleave(_nibble(values.to(tl.int32) << 19), _nibble(values.to(tl.int32) << 15))
    if GROUP > 0:
        if GROUP < BLOCK_K:
            groups = begin // GROUP + tl.arange(0, BLOCK_K // GROUP)
            mask = inside[:, None] & (groups < limit // GROUP)[None, :]
            found = tl.load(scales + columns[:, None] * (stride // GROUP) + groups[None, :], mask=mask, other=0.0)
            spread = tl.broadcast_to(found.to(tl.float32)[:, :, None], (BLOCK_N, BLOCK_K // GROUP, GROUP))
            values *= tl.reshape(spread, (BLOCK_N, BLOCK_K))
        else:
            found = tl.load(scales + columns * (stride // GROUP) + begin // GROUP, mask=inside, other=0.0)
            values *= found.to(tl.float32)[:, None]
    return values


@triton.jit
def products(
    codes,
    scales,
    columns,
    inside,
    begin,
    limit,
    stride,
    state,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WORDS: tl.constexpr,
):
    """(BLOCK_N, BLOCK_K / SPAN): for each SPAN inputs of some output channels, from ``begin`` on, of which there are
    ``limit``, the sum of the products of weights and ``state`` (BLOCK_K), float32 and 0 past the limit.

    With WORDS, of which channels have to be whole numbers, codes of integers are read as words of 4 bytes and masked in
    place, so that each takes three instructions: and, conversion, multiply-add. What is common to a span is done once:
    the number that codes stand above integers, and the scale, except that with a ``GROUP`` of 0 nothing is scaled.
    """
    PER: tl.constexpr = 32 // BITS  # pyright: ignore[reportAssignmentType]
    if BITS < 16 and codes.dtype.element_ty == tl.uint8 and WORDS:
        at = begin // PER + tl.arange(0, BLOCK_K // PER)
        place = codes.to(tl.pointer_type(tl.uint32)) + columns[:, None] * (stride // PER) + at[None, :]
        words = tl.load(place, mask=inside[:, None] & (at < limit // PER)[None, :], other=0)
        values = _fields(words, BITS)
        exponents = 127 - tl.arange(0, BLOCK_K) % PER * BITS
        fitting = state * (exponents << 23).to(tl.float32, bitcast=True)
        sums = tl.sum(tl.reshape(values * fitting[None, :], (BLOCK_N, BLOCK_K // SPAN, SPAN)), axis=2)
        common = tl.sum(tl.reshape(state, (BLOCK_K // SPAN, SPAN)), axis=1)
        sums -= common[None, :] * (1 << (BITS - 1))
    else:
        values = weight_tile(codes, scales, columns, inside, begin, limit, stride, BITS, 0, BLOCK_N, BLOCK_K)
        sums = values.to(tl.float32) * state[None, :]
        if SPAN > 1:
            sums = tl.sum(tl.reshape(sums, (BLOCK_N, BLOCK_K // SPAN, SPAN)), axis=2)
    if GROUP > 0:
        groups = tl.arange(0, BLOCK_K // SPAN)  # as it is where a span is a group, so that several are loaded at once
        groups = begin // GROUP + groups if SPAN == GROUP else (begin + groups * SPAN) // GROUP
        mask = inside[:, None] & (groups < limit // GROUP)[None, :]
        place = scales + columns[:, None] * (stride // GROUP) + groups[None, :]
        sums *= tl.load(place, mask=mask, other=0.0).to(tl.float32)
    return sums


@triton.jit
def _project_vector(
    states,
    codes,
    scales,
    out,
    outputs,
    units,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    UNIT: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STEPS: tl.constexpr,
    STAGES: tl.constexpr,
):
    width = units * UNIT
    WORDS: tl.constexpr = UNIT % 8 == 0
    token = tl.program_id(1).to(tl.int64)
    columns = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    inside = columns < outputs
    depth = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_N, BLOCK_K // SPAN), dtype=tl.float32)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        begin = step * BLOCK_K
        state = tl.load(states + token * width + begin + depth, mask=begin + depth < width, other=0.0).to(tl.float32)
        acc += products(
            codes, scales, columns, inside, begin, width, width, state, BITS, GROUP, SPAN, BLOCK_N, BLOCK_K, WORDS
        )
    result = tl.sum(acc, axis=1)
    if GROUP == 0:
        result *= tl.load(scales + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * outputs + columns, result.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def _project(
    states,
    codes,
    scales,
    out,
    tokens,
    outputs,
    units,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    width = units * UNIT  # whose alignment is known, and that of its parts, without a variant for each width
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
    size = weight.group % weight.shape[-1]
    return (weight.bits, size) if _is_group_size(size) else None


def _is_group_size(size: int) -> bool:
    """Whether the kernels take groups of so many inputs; 0 is all of them."""
    return not size or (size >= 16 and size & size - 1 == 0)


def takes(form: Form | None, *widths: int) -> bool:
    """Whether one kernel computes products with matrices of a form that have ``widths`` inputs."""
    sizes = {form[1] % width for width in widths} if form else {0}
    return len(sizes) == 1 and all(map(_is_group_size, sizes))


def stored(weight: Weight) -> tuple[Tensor, Tensor]:
    """What kernels read of a weight: its values or codes, and its scales, if it has any."""
    if isinstance(weight, Tensor):
        return weight, weight
    assert isinstance(weight, QuantizedWeight)
    return weight.codes, weight.scales


def span(bits: int, group: int) -> int:
    """Inputs that :func:`products` sums first: 16 bytes of codes, and none of two groups."""
    return min(128 // bits, group or 128 // bits) if bits < 16 else 1


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
    plan = plan or choose_plan(tokens, states.itemsize, weight.bits)
    unit = math.gcd(width, 256)
    if plan.block_m == 0:
        block_k = min(plan.block_k, triton.next_power_of_2(width))
        steps = -(-width // block_k)
        _project_vector[(-(-outputs // plan.block_n), tokens)](
            states, weight.codes, weight.scales, out, outputs, width // unit, BITS=form[0], GROUP=form[1], UNIT=unit,
            SPAN=span(*form), BLOCK_N=plan.block_n, BLOCK_K=block_k, STEPS=steps,
            STAGES=plan.stages if steps > 1 else 1, num_warps=plan.warps,
        )  # fmt: skip
        return out
    _project[(-(-outputs // plan.block_n), -(-tokens // plan.block_m))](
        states, weight.codes, weight.scales, out, tokens, outputs, width // unit, BITS=form[0], GROUP=form[1],
        UNIT=unit, BLOCK_M=plan.block_m, BLOCK_N=plan.block_n, BLOCK_K=plan.block_k, num_warps=plan.warps,
        num_stages=plan.stages,
    )  # fmt: skip
    return out
