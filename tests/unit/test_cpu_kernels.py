"""Native norms, router and latent attention: against float64, over poisoned memory, alone and in batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from kimi_vl.kernels import TORCH, Widths, reference
from kimi_vl.kernels.attention_metadata import DecodeMetadata
from kimi_vl.kernels.cpu import build, mla, norm
from kimi_vl.kernels.inputs import ROUNDING, Call, Inputs, apart, distance, with_arguments
from tests.unit.test_kernels import CASES, DTYPES, ODD, WIDE_HEADS, Fences, fenced, fences  # noqa: F401 - a fixture

NATIVE = dataclasses.replace(
    TORCH,
    name="native",
    add_rms_norm=norm.add_rms_norm,
    norm_router=norm.norm_router,
    mla_prepare=mla.mla_prepare,
    mla_decode=mla.mla_decode,
)
LONG = [1, 15, 16, 17, 31, 33, 64, 140, 511, 513, 700]

pytestmark = pytest.mark.skipif(
    not set(build.NEEDED) <= build.processor_features(), reason="this processor has no AVX-512"
)


@pytest.fixture(autouse=True)
def one_thread():
    """What two threads share out is the same; a busy machine keeps them waiting for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_twin(case: str, dtype: torch.dtype, fences: Fences):  # noqa: F811
    call = fenced(CASES[case](dtype), fences)
    found = apart(call, call.run(NATIVE), dtype)
    assert found <= 1, found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "lengths", [[2000], [2000, 1, 1993, 600], [1000 - 7 * number for number in range(16)]], ids=str
)
def test_long_contexts(lengths: list[int], dtype: torch.dtype, fences: Fences):  # noqa: F811
    """Errors of float32 sums grow with their terms: here 4 times what is allowed to short ones."""
    widths = dataclasses.replace(Widths(), rank=128, rope=32, nope=16, value=16)
    call = fenced(Inputs(widths, dtype).mla_decode(lengths), fences)
    assert apart(call, call.run(NATIVE), dtype) <= (1 if dtype == torch.bfloat16 else 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sharpness", [0.0, 30.0, 3000.0])
def test_any_scores(sharpness: float, dtype: torch.dtype):
    """From all equal to a single token that has all the weight, far beyond what e^x can be.

    The error of a score grows with it, and softmax makes it one of a weight: in PyTorch as well.
    """
    call = Inputs(ODD, dtype).mla_decode([150, 9])
    call = with_arguments(call, lambda values: values.__setitem__(3, values[3] * sharpness))
    found, plain = (apart(call, call.run(ops), dtype) for ops in (NATIVE, TORCH))
    assert found <= max(1, 1.25 * plain)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [1, 3, 7])
def test_addresses_of_any_alignment(offset: int, dtype: torch.dtype):
    def moved(value: Any) -> Any:
        if isinstance(value, DecodeMetadata):
            return DecodeMetadata(moved(value.page_table), moved(value.seq_lens), value.page_size)
        if not isinstance(value, Tensor) or not value.is_contiguous():
            return value
        return value.new_empty(value.numel() + offset)[offset:].view(value.shape).copy_(value)

    inputs = Inputs(ODD, dtype)
    for call in (inputs.add_rms_norm(3), inputs.norm_router(5), inputs.mla_prepare(5, 3), inputs.mla_decode([9, 40])):
        other = with_arguments(call, lambda values: values.__setitem__(slice(None), map(moved, list(values))))
        for one, another in zip(call.run(NATIVE), other.run(NATIVE), strict=True):
            assert torch.equal(one, another)


# Every sum of two bfloat16 values, and the rest


def every_value() -> Tensor:
    return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def same(one: Tensor, another: Tensor) -> bool:
    """Bit for bit, but for the bits of a NaN."""
    return torch.equal(one.nan_to_num(), another.nan_to_num()) and torch.equal(one.isnan(), another.isnan())


@pytest.mark.parametrize("shift", [0, 1, 128, 12345, 32768, 65535])
def test_sums_are_rounded_as_torch_does(shift: int):
    """Of all bfloat16 values, denormals, infinities and NaN among them, each with another one."""
    residual = every_value().view(64, 1024)
    delta = residual.flatten().roll(shift).view(64, 1024)
    total, _ = norm.add_rms_norm(residual, delta, torch.ones(1024, dtype=torch.bfloat16), 1e-5)
    assert same(total, residual + delta)


def test_norms_are_rounded_twice():
    """Before the weight and after it, as the published model's are: sums in another order seldom change a result."""
    call = Inputs(dtype=torch.bfloat16).add_rms_norm(64)
    for found, right in zip(call.run(NATIVE), call.run(TORCH), strict=True):
        assert float((found != right).double().mean()) < 1e-3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_stays_in_its_token(dtype: torch.dtype):
    inputs = Inputs(ODD, dtype)
    call = inputs.norm_router(6)
    clean = call.run(NATIVE)
    call.arguments[0][1, 5], call.arguments[1][2, 87], call.arguments[0][4, 0] = torch.nan, torch.inf, -torch.inf
    total, normed, topk_ids, topk_weights = call.run(NATIVE)
    right_total, right_normed = reference.add_rms_norm(*call.arguments[:4])
    assert same(total, right_total)
    for token in (0, 3, 5):
        for found, right in zip((total, normed, topk_ids, topk_weights), clean, strict=True):
            assert torch.equal(found[token], right[token])
    for token in (1, 2, 4):
        assert torch.equal(normed[token].isnan(), right_normed[token].isnan())
        assert topk_weights[token].isnan().all()
        assert len(set(topk_ids[token].tolist()) & set(range(ODD.experts))) == ODD.top_k, "ids that exist, each once"


def test_a_bias_of_the_models_dtype(monkeypatch: pytest.MonkeyPatch):
    """A checkpoint's bias may be bfloat16; that is no reason to leave the router to PyTorch."""
    call = Inputs(ODD, torch.bfloat16).norm_router(5)
    call = with_arguments(call, lambda values: values.__setitem__(5, values[5].bfloat16()))
    monkeypatch.setattr(reference, "add_rms_norm", None)
    found = call.run(NATIVE)
    monkeypatch.undo()
    assert apart(call, found, torch.bfloat16) <= 1


def test_a_score_that_is_not_a_number_is_the_greatest():
    """As torch has it: a broken weight shows in what is computed with it."""
    call = Inputs(ODD, torch.float32).norm_router(4)
    call.arguments[4][5, 3] = torch.nan
    _, _, topk_ids, topk_weights = call.run(NATIVE)
    assert torch.equal(topk_ids, call.run(TORCH)[2])
    assert topk_ids[:, 0].tolist() == [5] * 4
    assert topk_weights.isnan().all()


def test_equal_scores_take_the_first_experts():
    inputs = Inputs(ODD, torch.float32)
    call = inputs.norm_router(3)
    call.arguments[4].zero_()
    call.arguments[5].zero_()
    _, _, topk_ids, topk_weights = call.run(NATIVE)
    assert topk_ids.tolist() == [[0, 1, 2]] * 3
    assert topk_weights.allclose(torch.full((3, 3), ODD.scaling / 3))
    call.arguments[5][4] = 1e-3
    call.arguments[5][1] = -1e-3
    assert call.run(NATIVE)[2].tolist() == [[4, 0, 2]] * 3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("column", [3, -2], ids=["latent", "rotary"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_cached_value_that_is_not_finite(dtype: torch.dtype, column: int, value: float):
    """It spoils the heads that would see it in float64, of its sequence alone; a weight of 0 hides it."""
    call = Inputs(ODD, dtype).mla_decode([40, 33, 70], common=2)
    clean = call.run(NATIVE)[0]
    kv_cache, decode = call.arguments[1:3]
    kv_cache[decode.page_table[2, 5], 4, column] = value
    (found,), (right,) = call.run(NATIVE), call.twin()
    assert torch.equal(found[:2], clean[:2])
    assert torch.equal(found.isfinite(), right.isfinite())
    kept = right.isfinite()
    assert distance(found[kept], right[kept]) <= 3 * ROUNDING[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_stretch_of_scores_of_minus_infinity(dtype: torch.dtype):
    """The weights there are 0, although no score of the stretch is finite; all of them without any is NaN."""
    call = Inputs(ODD, dtype).mla_decode([70, 9])
    query, kv_cache, decode = call.arguments[:3]
    query[0, :, -1], query[1, :, -1] = torch.tensor([1.0, -1.0, -2.0]), 1.0
    kv_cache[decode.page_table[0, :5].long(), :, -1] = -torch.inf  # 40 of 70 cached tokens
    kv_cache[decode.page_table[1, :2].long(), :, -1] = -torch.inf  # all 9
    (found,), (right,) = call.run(NATIVE), call.twin()
    assert torch.equal(found.isfinite(), right.isfinite())
    assert found[:, 0].isfinite().all(-1).tolist() == [True, False]
    kept = right.isfinite()
    assert distance(found[kept], right[kept]) <= 3 * ROUNDING[dtype]


# Alone and in any batch


def alone(call: Call, per_token: Sequence[int], tokens: int) -> list[tuple[Tensor, ...]]:
    """The results of each token by itself; ``per_token`` are the arguments that have one line for each."""
    found = []
    for token in range(tokens):
        arguments = [
            value[token : token + 1] if index in per_token else value for index, value in enumerate(call.arguments)
        ]
        found.append(Call(call.op, tuple(arguments), 0).run(NATIVE))
    return found


@pytest.mark.parametrize("widths", [ODD, Widths(experts=20, heads=4)], ids=["odd", "published"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_is_the_same_alone_and_among_others(widths: Widths, dtype: torch.dtype):
    inputs = Inputs(widths, dtype)
    for call, per_token in ((inputs.add_rms_norm(19), (0, 1)), (inputs.norm_router(35), (0, 1))):
        together = call.run(NATIVE)
        for token, results in enumerate(alone(call, per_token, len(call.arguments[0]))):
            for found, right in zip(results, together, strict=True):
                assert torch.equal(found[0], right[token]), (call.op, token)
    call = inputs.mla_prepare(21, 13)
    joined, rope, slot_mapping = (call.arguments[index] for index in (0, 3, 5))
    query, rotated, written = call.run(NATIVE)
    for token in range(21):
        own = list(call.arguments)
        own[0], own[3], own[5], own[7] = (
            joined[token : token + 1], rope[token : token + 1], slot_mapping[token : token + 1], int(token < 13)
        )  # fmt: skip
        one_query, one_rotated, one_written = Call(call.op, tuple(own), 0, 4).run(NATIVE)
        right = query[token, :, widths.rank :] if token < 13 else rotated[token - 13]
        assert torch.equal((one_query[..., widths.rank :] if token < 13 else one_rotated)[0], right)
        slot = int(slot_mapping[token])
        assert torch.equal(one_written.flatten(0, 1)[slot], written.flatten(0, 1)[slot])


def mixed(call: Call) -> Tensor:
    """What attention gives before the latent space is left, in (B, N R)."""
    found: list[Tensor] = []

    def keep(states: Tensor, weight: Tensor) -> Tensor:
        found.append(states.flatten(1))
        return reference.per_head(states, weight)

    mla.mla_decode(*call.arguments, per_head=keep)
    return found[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("widths", [ODD, WIDE_HEADS], ids=["odd", "more heads than lanes"])
def test_a_sequence_is_the_same_alone_in_any_batch_and_on_any_pages(widths: Widths, dtype: torch.dtype):
    call = Inputs(widths, dtype).mla_decode([*LONG, 0, 2000], 260)
    query, kv_cache, decode, scale, to_value = call.arguments
    together = mixed(call)
    order = torch.randperm(len(query), generator=torch.Generator().manual_seed(1))
    turned = DecodeMetadata(decode.page_table[order], decode.seq_lens[order], decode.page_size)
    assert torch.equal(mixed(Call("mla_decode", (query[order], kv_cache, turned, scale, to_value), 0)), together[order])
    for sequence, length in enumerate(decode.seq_lens.tolist()):
        pages = decode.page_table[sequence, : -(-length // decode.page_size)].long()
        own = kv_cache[pages]  # in order, and no other ones
        table = torch.arange(len(pages), dtype=torch.int32)[None]
        metadata = DecodeMetadata(table, torch.tensor([length], dtype=torch.int32), decode.page_size)
        one = mixed(Call("mla_decode", (query[sequence : sequence + 1], own, metadata, scale, to_value), 0))
        assert torch.equal(one[0], together[sequence]), length


def test_threads_share_the_work_and_change_nothing():
    inputs = Inputs(Widths(experts=20), torch.bfloat16)
    for call in (
        inputs.add_rms_norm(33), inputs.norm_router(33), inputs.mla_prepare(17, 3), inputs.mla_decode([140, 9, 600])
    ):  # fmt: skip
        torch.set_num_threads(1)
        right = call.run(NATIVE)
        for count in (2, 3):
            torch.set_num_threads(count)
            for one, another in zip(call.run(NATIVE), right, strict=True):
                assert torch.equal(one, another), (call.op, count)


# What they leave to PyTorch


MAKE: dict[str, Callable[[Inputs], Call]] = {
    "norm": lambda inputs: inputs.add_rms_norm(3),
    "router": lambda inputs: inputs.norm_router(3),
    "prepare": lambda inputs: inputs.mla_prepare(3),
    "attention": lambda inputs: inputs.mla_decode([9]),
}


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_other_dtypes_are_computed_in_pytorch(make: Callable[[Inputs], Call]):
    call = make(Inputs(ODD, torch.float64))
    for found, right in zip(call.run(NATIVE), call.twin(), strict=True):
        assert distance(found, right) <= 1e-12
    states = make(Inputs(ODD, torch.bfloat16))
    wider = with_arguments(states, lambda values: values.__setitem__(0, values[0].float()))
    if states.op in ("add_rms_norm", "norm_router"):  # the sum has the wider type
        assert wider.run(NATIVE)[0].dtype == torch.float32


def test_states_need_not_be_contiguous():
    inputs = Inputs(ODD, torch.bfloat16)
    for call in (inputs.add_rms_norm(4), inputs.norm_router(4), inputs.mla_prepare(4, 2), inputs.mla_decode([9, 40])):
        other = with_arguments(call, lambda values: values.__setitem__(0, values[0].mT.contiguous().mT))
        assert not other.arguments[0].is_contiguous()
        for one, another in zip(call.run(NATIVE), other.run(NATIVE), strict=True):
            assert torch.equal(one, another)


def test_one_pool_of_threads():
    """Native code and torch share OpenMP's runtime: one copy of it is in the process."""
    build.library()
    with open("/proc/self/maps", encoding="utf-8") as maps:
        found = {line.split()[-1] for line in maps if "gomp" in line or "iomp" in line or "libomp" in line}
    assert len(found) == 1, found
