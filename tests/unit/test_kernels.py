"""Every kernel in Triton's interpreter against its float64 twin, and what compiles.

Memory that a kernel asks for is poisoned and fenced, and so are its inputs: a value that was never written, or was read
or written past an end, shows.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bench_suite import triton_on_cpu  # isort: skip

assert triton_on_cpu.interpreter  # it comes before any kernel

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402
from triton.runtime.errors import InterpreterError  # noqa: E402

from kimi_vl import kernels  # noqa: E402
from kimi_vl.kernels import (  # noqa: E402
    Widths,
    attention_metadata,
    linear,
    plain,
    reference,
)
from kimi_vl.kernels.attention_metadata import DecodeMetadata  # noqa: E402
from kimi_vl.kernels.inputs import (  # noqa: E402
    ROUNDING,
    Call,
    Inputs,
    apart,
    distance,
    routed_alike,
    with_arguments,
)
from kimi_vl.kernels.triton import mla, moe, moe_grouping, norm  # noqa: E402

ROOT = Path(__file__).parents[2]
TRITON = kernels.select_ops("cpu", "triton")
# numbers that are not finite are put in on purpose
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DTYPES = [torch.float32, torch.bfloat16]

# No width is a power of two, nor a multiple of what a kernel takes at a time.
ODD = Widths(
    hidden=88,
    experts=7,
    top_k=3,
    inner=24,
    shared=48,
    heads=3,
    rank=40,
    rope=12,
    nope=20,
    value=28,
    page_size=8,
    scaling=1.7,
)
WIDE_RANK = Widths(hidden=64, heads=2, rank=136, rope=16, nope=40, value=24, page_size=32)
WIDE_HEADS = Widths(hidden=64, heads=20, rank=64, rope=16, nope=16, value=16, page_size=32)
REAL_FEW_EXPERTS = Widths(experts=2, top_k=1, shared=1408)

FENCE = 64
POISON = {True: float("nan"), False: 10**6}  # floating or not


class Fences:
    """Tensors between two strips of poison."""

    def __init__(self) -> None:
        self._strips: list[Tensor] = []

    def around(self, shape: Any, dtype: torch.dtype) -> Tensor:
        count = torch.Size(shape).numel()
        values = torch.full((count + 2 * FENCE,), POISON[dtype.is_floating_point], dtype=dtype)
        self._strips += [values[:FENCE], values[FENCE + count :]]
        return values[FENCE : FENCE + count].view(shape)

    def copy(self, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(self.copy(each) for each in value)
        if isinstance(value, DecodeMetadata):
            return DecodeMetadata(self.copy(value.page_table), self.copy(value.seq_lens), value.page_size)
        if not isinstance(value, Tensor) or not value.is_contiguous():
            return value
        return self.around(value.shape, value.dtype).copy_(value)

    def whole(self) -> bool:
        return all(
            bool(strip.isnan().all()) if strip.is_floating_point() else bool((strip == POISON[False]).all())
            for strip in self._strips
        )


@pytest.fixture(autouse=True)
def fences(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fences]:
    """Whatever is asked for uninitialised is poisoned and fenced; the fences stand at the end."""
    made = Fences()

    def empty(*shape: Any, dtype: torch.dtype = torch.float32, device: Any = None) -> Tensor:
        assert torch.device(device or "cpu").type == "cpu"
        return made.around(shape[0] if isinstance(shape[0], tuple | torch.Size) else shape, dtype)

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch, "empty_like", lambda value: empty(value.shape, dtype=value.dtype))
    yield made
    assert made.whole()


def fenced(call: Call, fences: Fences) -> Call:
    return with_arguments(call, lambda values: values.__setitem__(slice(None), fences.copy(tuple(values))))


CASES: dict[str, Callable[[torch.dtype], Call]] = {
    "norm of one row": lambda dtype: Inputs(ODD, dtype).add_rms_norm(1),
    "norm of many rows": lambda dtype: Inputs(ODD, dtype).add_rms_norm(2, 5),
    "norm without delta": lambda dtype: Inputs(ODD, dtype).add_rms_norm(3, delta=False),
    "norm, real width": lambda dtype: Inputs(dtype=dtype).add_rms_norm(3),
    "router, one token": lambda dtype: Inputs(ODD, dtype).norm_router(1),
    "router, 16 tokens": lambda dtype: Inputs(ODD, dtype).norm_router(16),
    "router, most tokens of several programs": lambda dtype: Inputs(ODD, dtype).norm_router(norm.FEW),
    "router, more tokens": lambda dtype: Inputs(ODD, dtype).norm_router(norm.FEW + 1),
    "router, real width": lambda dtype: Inputs(dtype=dtype).norm_router(3),
    "router, more tokens, real width": lambda dtype: Inputs(dtype=dtype).norm_router(norm.FEW + 9),
    "prepare, one token": lambda dtype: Inputs(ODD, dtype).mla_prepare(1),
    "prepare, tokens without a slot": lambda dtype: Inputs(ODD, dtype).mla_prepare(5, unwritten=2),
    "prepare, tokens of chunks": lambda dtype: Inputs(ODD, dtype).mla_prepare(37, 18),
    "prepare, chunks alone": lambda dtype: Inputs(ODD, dtype).mla_prepare(17, 0),
    "prepare, as many heads as a tile and more": lambda dtype: Inputs(WIDE_HEADS, dtype).mla_prepare(2, 1),
    "prepare, more columns than a program's": lambda dtype: Inputs(WIDE_RANK, dtype).mla_prepare(3),
    "prepare, real width": lambda dtype: Inputs(dtype=dtype).mla_prepare(3, 2),
    "attention, one token": lambda dtype: Inputs(ODD, dtype).mla_decode([1]),
    "attention, a page less one": lambda dtype: Inputs(ODD, dtype).mla_decode([7]),
    "attention, a page": lambda dtype: Inputs(ODD, dtype).mla_decode([8]),
    "attention, a page and one": lambda dtype: Inputs(ODD, dtype).mla_decode([9]),
    "attention, all of them and none": lambda dtype: Inputs(ODD, dtype).mla_decode([9, 1, 0, 8, 150, 7, 64], 32),
    "attention, pages shared": lambda dtype: Inputs(ODD, dtype).mla_decode([40, 33, 17, 70], common=3),
    "attention, more heads than a tile": lambda dtype: Inputs(WIDE_HEADS, dtype).mla_decode([31, 33, 140], 16),
    "attention, more sequences than a tile": lambda dtype: Inputs(ODD, dtype).mla_decode([*range(3, 200, 11)], 25),
    "attention, real width": lambda dtype: Inputs(dtype=dtype).mla_decode([31, 32, 33, 200], 16),
    "prefill, one token": lambda dtype: Inputs(ODD, dtype).mla_prefill(1, 1),
    "prefill, a prompt": lambda dtype: Inputs(ODD, dtype).mla_prefill(37, 37),
    "prefill, a chunk": lambda dtype: Inputs(ODD, dtype).mla_prefill(21, 90),
    "prefill, two tokens of many": lambda dtype: Inputs(WIDE_RANK, dtype).mla_prefill(2, 131),
    "prefill, more than a block": lambda dtype: Inputs(WIDE_RANK, dtype).mla_prefill(67, 130),
    "prefill, real width": lambda dtype: Inputs(dtype=dtype).mla_prefill(33, 100),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] * ("real width" in case)) for case in CASES]
)
def test_twin(case: str, dtype: torch.dtype, fences: Fences):
    call = fenced(CASES[case](dtype), fences)
    found = apart(call, call.run(TRITON), dtype)
    assert found <= 1, found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [case for case in CASES if "without a slot" not in case])  # only static ones take it
def test_plain_twin(case: str, dtype: torch.dtype, fences: Fences):
    call = fenced(CASES[case](dtype), fences)
    found = apart(call, call.run(kernels.TORCH), dtype)
    assert found <= 1, found


# Experts

TILE = moe.Tile(32, 32, 4, 1)
PLANS = {
    "pairs": moe.Plan(0, moe.Tile(16, 0, 4, 1), moe.Tile(32, 16, 4, 1)),
    "blocks of 16": moe.Plan(16, TILE, TILE),
    "blocks of 64": moe.Plan(64, TILE, TILE),
}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(
    ("tokens", "routing", "shared"),
    [(1, "random", True), (2, "distinct", True), (7, "random", False), (7, "same", True)],
)
def test_experts(tokens: int, routing: str, shared: bool, plan: str, fences: Fences):
    dtype = torch.bfloat16 if tokens % 2 else torch.float32
    call = fenced(Inputs(ODD, dtype).moe(tokens, routing, shared), fences)
    found = apart(call, call.run(TRITON, plan=PLANS[plan]), dtype)
    assert found <= 1, found


WAYS = {"on a CPU": None, "grouped": plain._grouped, "gathered": plain._of_gathered, "of all": plain._of_all}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("tokens", "routing"),
    [(1, "random"), (2, "distinct"), (7, "random"), (7, "same"), (16, "same"), (30, "random"), (37, "same")],
)
def test_experts_without_kernels(
    tokens: int, routing: str, way: str, dtype: torch.dtype, fences: Fences, monkeypatch: pytest.MonkeyPatch
):
    if WAYS[way] is not None:
        monkeypatch.setattr(plain, "_by_expert", WAYS[way])
    call = fenced(Inputs(ODD, dtype).moe(tokens, routing, shared=tokens % 2 == 0), fences)
    found = apart(call, call.run(kernels.TORCH), dtype)
    assert found <= 1, found


@pytest.mark.parametrize("way", [plain._grouped, plain._of_gathered, plain._of_all, plain._by_expert])
def test_a_spoilt_token_spoils_only_itself_on_any_device(way: Any):
    states, topk_ids, _, gate_up, down, _ = Inputs(ODD, torch.bfloat16).moe(5, "same").arguments
    clean = way(states, topk_ids, gate_up, down)
    states[1] = float("nan")
    spoilt = way(states, topk_ids, gate_up, down)
    assert spoilt[1].isnan().all()
    assert torch.equal(spoilt[[0, 2, 3, 4]], clean[[0, 2, 3, 4]])


@pytest.mark.parametrize(
    ("tokens", "capability", "dtype", "way"),
    [
        (1, (9, 0), torch.bfloat16, "_grouped"),
        (1024, (10, 0), torch.bfloat16, "_grouped"),
        (1, (9, 0), torch.float32, "_of_gathered"),
        *[(1, capability, torch.bfloat16, "_of_gathered") for capability in [(8, 0), (8, 9), (10, 3), (12, 0)]],
        (3, (8, 0), torch.bfloat16, "_of_gathered"),
        (4, (8, 0), torch.bfloat16, "_of_all"),
        (64, (8, 9), torch.bfloat16, "_of_all"),
        (128, (8, 0), torch.bfloat16, "_of_all"),
        (129, (8, 0), torch.bfloat16, "_by_expert"),
    ],
)
def test_how_a_gpu_computes_experts(
    tokens: int, capability: tuple[int, int], dtype: torch.dtype, way: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    stand_in = {"is_cuda": True, "dtype": dtype, "device": "cuda:0", "__len__": lambda self: tokens}
    states: Any = type("States", (), stand_in)()
    topk_ids, down = torch.empty(tokens, 6), torch.empty(64, 16, 8)
    assert plain._on_device(states, topk_ids, down) is getattr(plain, way)
    assert plain._on_device(states, topk_ids, torch.empty(64, 16, 9)) is not plain._grouped


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (5,), (1, 1), (2, 3)], ids=str)
def test_project_is_the_naive_one(shape: tuple[int, ...], dtype: torch.dtype):
    """A GEMV for one token, W·xᵀ for more, with any dimensions before the last."""
    inputs = Inputs(ODD, dtype)
    states, weight = inputs.normal(*shape, 24), inputs.normal(40, 24)
    right = linear.naive_project(states.double(), weight.double())
    found = linear.project(states, weight)
    assert found.shape == (*shape, 40)
    assert distance(found, right) <= ROUNDING[dtype]


@pytest.mark.parametrize(("tokens", "plan"), [(33, "blocks of 16"), (70, "blocks of 64")])
def test_an_expert_with_more_rows_than_a_block(tokens: int, plan: str, fences: Fences):
    call = fenced(Inputs(ODD, torch.float32).moe(tokens, "same"), fences)
    found = apart(call, call.run(TRITON, plan=PLANS[plan]), torch.float32)
    assert found <= 1, found


@pytest.mark.slow
@pytest.mark.parametrize(("tokens", "plan"), [(1, "pairs"), (3, "blocks of 16")])
def test_experts_at_the_real_widths(tokens: int, plan: str, fences: Fences):
    tiles = {
        "pairs": moe.Plan(0, moe.Tile(256, 0, 4, 1), moe.Tile(256, 512, 4, 1)),
        "blocks of 16": moe.Plan(16, moe.Tile(256, 512, 4, 1), moe.Tile(256, 512, 4, 1)),
    }
    call = fenced(Inputs(REAL_FEW_EXPERTS, torch.bfloat16).moe(tokens), fences)
    found = apart(call, call.run(TRITON, plan=tiles[plan]), torch.bfloat16)
    assert found <= 1, found


@pytest.mark.parametrize("tokens", [1, 30])
def test_the_chosen_plan(tokens: int, fences: Fences):
    """As it is called in earnest, with tiles wider than anything here."""
    widths = Widths(hidden=64, experts=16, top_k=4, inner=32, shared=32)
    call = fenced(Inputs(widths, torch.bfloat16).moe(tokens), fences)
    found = apart(call, call.run(TRITON), torch.bfloat16)
    assert found <= 1, found


def test_plans_by_size():
    plans = [moe.choose_plan(tokens, 6, 64, 2) for tokens in (1, 2, 3, 170, 171, 682, 683)]
    pairs, few, some, many = moe.PAIRS, moe.FEW, moe.SOME, moe.MANY
    assert plans == [pairs, pairs, few, few, some, some, many]
    assert moe.choose_plan(2048, 6, 64, 2, 16, 99 << 10) == some
    assert moe.choose_plan(1, 6, 64, 4) == pairs
    assert moe.choose_plan(1000, 6, 64, 4) == moe.FLOAT32
    assert [moe.choose_plan(tokens, 6, 64, 2, 4) for tokens in (5, 6)] == [moe.INT4_PAIRS, moe.INT4_FEW]
    assert [moe.choose_plan(tokens, 6, 64, 2, 8) for tokens in (5, 6)] == [moe.QUANTIZED_PAIRS, moe.QUANTIZED_FEW]


@pytest.mark.parametrize("rows", [16, 64])
@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "shared"), [(1, 1, 1, 0), (1, 3, 8, 2), (67, 3, 8, 2), (40, 6, 64, 1), (70, 2, 3, 0)]
)
@pytest.mark.parametrize("spread", [1, 1000], ids=["the same expert", "any"])
def test_order(tokens: int, top_k: int, experts: int, shared: int, rows: int, spread: int):
    """Every pair stands once, in a block of its expert, in the order of the tokens; the bound on blocks holds."""
    draw = random.Random(tokens + rows)
    listed = [[(draw.randrange(spread) + slot) % experts for slot in range(top_k)] for _ in range(tokens)]
    topk_ids, slots = torch.tensor(listed, dtype=torch.int32), top_k + shared
    blocks = moe_grouping.most_blocks(tokens, top_k, experts, shared, rows)
    sorted_pairs, expert_ids = torch.empty(blocks * rows, dtype=torch.int32), torch.empty(blocks, dtype=torch.int32)
    moe_grouping.group(topk_ids, sorted_pairs, expert_ids, experts, shared, rows)
    wanted: dict[int, list[int]] = {}
    for token, ids in enumerate(listed):
        for slot, expert in enumerate([*ids, *range(experts, experts + shared)]):
            wanted.setdefault(expert, []).append(token * slots + slot)
    found: dict[int, list[int]] = {}
    for block, expert in enumerate(expert_ids.tolist()):
        if expert >= 0:
            found.setdefault(expert, []).extend(sorted_pairs[block * rows : (block + 1) * rows].tolist())
        else:
            assert set(expert_ids[block:].tolist()) == {-1}
    assert {expert: [pair for pair in pairs if pair != tokens * slots] for expert, pairs in found.items()} == wanted
    for expert, pairs in found.items():
        assert len(pairs) == -(-len(wanted[expert]) // rows) * rows


def test_the_bound_on_blocks_is_reached_and_never_passed():
    draw = random.Random(0)
    for tokens, top_k, experts, rows in [(1, 6, 64, 16), (33, 2, 5, 16), (40, 6, 8, 16)]:
        bound = moe_grouping.most_blocks(tokens, top_k, experts, 0, rows)
        pairs = tokens * top_k
        most = 0
        for _ in range(3000):
            # any division of the pairs, not only those that a choice of distinct experts can give
            cuts = sorted(draw.choices(range(pairs + 1), k=experts - 1))
            counts = [high - low for low, high in zip([0, *cuts], [*cuts, pairs], strict=True)]
            most = max(most, sum(-(-count // rows) for count in counts))
        ones = [1] * (min(pairs, experts) - 1)
        most = max(most, len(ones) + -(-(pairs - len(ones)) // rows))
        assert most == bound


@pytest.mark.parametrize("plan", PLANS)
def test_a_spoilt_token_spoils_only_itself(plan: str):
    call = Inputs(ODD, torch.float32).moe(4, "same")
    (clean,) = call.run(TRITON, plan=PLANS[plan])
    call.arguments[0][1] = float("nan")
    (spoilt,) = call.run(TRITON, plan=PLANS[plan])
    assert spoilt[1].isnan().all()
    assert torch.equal(spoilt[[0, 2, 3]], clean[[0, 2, 3]])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "routing"), [(4, "same"), (4, "random"), (20, "random")])
def test_a_spoilt_token_spoils_only_itself_without_kernels(tokens: int, routing: str, dtype: torch.dtype):
    call = Inputs(ODD, dtype).moe(tokens, routing)
    (clean,) = call.run(kernels.TORCH)
    call.arguments[0][1] = float("nan")
    (spoilt,) = call.run(kernels.TORCH)
    others = [token for token in range(tokens) if token != 1]
    assert spoilt[1].isnan().all()
    assert torch.equal(spoilt[others], clean[others])


# The router


@pytest.fixture(params=["several programs a token", "several tokens a program"])
def either_router(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    if request.param == "several tokens a program":
        monkeypatch.setattr(norm, "FEW", 0)


def routed(states: Tensor, weight: Tensor, bias: Tensor, top_k: int, scaling: float) -> tuple[Tensor, Tensor]:
    """The choice for states whose root mean square is 1, so that their norm is themselves."""
    width = states.shape[-1]
    none = torch.zeros_like(states)
    return TRITON.norm_router(states, none, torch.ones(width), 0.0, weight, bias, top_k, scaling)[2:]


@pytest.mark.usefixtures("either_router")
def test_a_spoilt_token_chooses_experts_that_exist():
    """Else a kernel after it would read out of bounds and take everybody down."""
    call = Inputs(ODD, torch.float32).norm_router(4)
    clean = call.run(TRITON)
    call.arguments[0][2] = float("nan")
    call.arguments[1][3, 0] = float("inf")
    spoilt = call.run(TRITON)
    topk_ids, topk_weights = spoilt[2:]
    assert ((topk_ids >= 0) & (topk_ids < ODD.experts)).all()
    assert all(torch.equal(one[:2], other[:2]) for one, other in zip(spoilt, clean, strict=True))
    assert topk_weights[2].isnan().all()


@pytest.mark.usefixtures("either_router")
def test_a_score_that_is_no_number_is_chosen_last():
    states, weight = torch.ones(1, 16), torch.ones(5, 16)
    bias = torch.tensor([float("nan"), 0.1, float("nan"), 0.3, 0.2])
    assert routed(states, weight, bias, 3, 1.0)[0].tolist() == [[3, 4, 1]]


@pytest.mark.usefixtures("either_router")
def test_equal_scores_take_the_first():
    states, weight = torch.ones(2, 16), torch.ones(9, 16)
    topk_ids, topk_weights = routed(states, weight, torch.tensor([0.0, 0, 1, 0, 0, 1, 0, 0, 0]), 4, 2.0)
    assert topk_ids.tolist() == [[2, 5, 0, 1]] * 2
    torch.testing.assert_close(topk_weights, torch.full((2, 4), 0.5))


@pytest.mark.usefixtures("either_router")
def test_scores_that_all_vanish():
    states, weight = torch.ones(1, 16), torch.full((4, 16), -100.0)
    topk_ids, topk_weights = routed(states, weight, torch.arange(4.0), 2, 2.0)
    assert topk_ids.tolist() == [[3, 2]]
    assert topk_weights.tolist() == [[0, 0]]


@pytest.mark.usefixtures("either_router")
def test_router_weights_of_another_dtype():
    call = Inputs(ODD, torch.bfloat16).norm_router(5)
    call = with_arguments(call, lambda values: values.__setitem__(4, values[4].float() * 1.001))
    found = apart(call, call.run(TRITON), torch.bfloat16)
    assert found <= 1, found


# Attention


@pytest.mark.parametrize(("splits", "page_size"), [(1, 32), (2, 8), (2, 48), (20, 32)])
def test_any_split(splits: int, page_size: int, fences: Fences):
    widths = Widths(heads=3, rank=40, rope=12, page_size=page_size)
    call = fenced(Inputs(widths, torch.float32).mla_decode([1, 63, 64, 65, 230, 0], 40), fences)
    found = apart(call, call.run(TRITON, splits=splits), torch.float32)
    assert found <= 1, found


def test_more_splits_than_are_combined_at_a_time():
    """The last ones weigh most, so that what was combined before them has to be scaled down."""
    widths = Widths(heads=2, rank=16, rope=16)
    call = Inputs(widths, torch.float32).mla_decode([1300])
    _, kv_cache, decode = call.arguments[:3]
    kv_cache[decode.page_table[0, -3:].long()] *= 3
    found = apart(call, call.run(TRITON, splits=30), torch.float32)
    assert found <= 1, found


def test_decode_attention_is_batch_invariant():
    """A sequence's bits are the same in another batch, in another place, with its pages elsewhere."""
    call = Inputs(ODD, torch.float32).mla_decode([30, 100, 5], 16)
    query, kv_cache, decode, *rest = call.arguments
    page_table, seq_lens = decode.page_table, decode.seq_lens
    (together,) = call.run(TRITON, splits=2)
    for row in range(3):
        own = DecodeMetadata(page_table[row : row + 1], seq_lens[row : row + 1], ODD.page_size)
        alone = TRITON.mla_decode(query[row : row + 1], kv_cache, own, *rest, 2)
        assert torch.equal(alone[0], together[row])
    moved = torch.randperm(len(kv_cache), generator=torch.Generator().manual_seed(1))
    places = torch.where(page_table >= 0, moved.argsort()[page_table.clamp(min=0).long()], -1).int()
    order = [2, 0, 1]
    query[1] = float("nan")
    other = TRITON.mla_decode(
        query[order], kv_cache[moved], DecodeMetadata(places[order], seq_lens[order], 8), *rest, 2
    )
    assert torch.equal(other[:2], together[[2, 0]])
    assert other[2].isnan().all()


def test_lengths_grow_under_the_same_launch():
    """A captured graph is replayed with the same shapes: nothing but the lengths' values may say how far to go."""
    call = Inputs(ODD, torch.float32).mla_decode([200, 180], 32)
    kv_cache, decode = call.arguments[1:3]
    full = kv_cache.clone()
    for count in (1, 8, 65, 129, 180):
        kv_cache.copy_(full)
        for row, length in enumerate((200, 180)):  # what is to come is not there yet
            for at in range(count, length):
                kv_cache[decode.page_table[row, at // ODD.page_size], at % ODD.page_size] = float("nan")
        decode.seq_lens.fill_(count)
        found = apart(call, call.run(TRITON), torch.float32)
        assert found <= 1, (count, found)


@pytest.mark.parametrize("lengths", [[5], [9, 9, 9], [200, 3, 7, 0, 190, 40, 1, 3, 90], [1] * 30, [0, 0]])
@pytest.mark.parametrize("gathered", [1, 64, 401, 1 << 20])
def test_entries_are_gathered_for_a_block_at_a_time(
    lengths: list[int], gathered: int, fences: Fences, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(attention_metadata, "GATHERED", gathered)
    call = fenced(Inputs(ODD, torch.float32).mla_decode(lengths, 25), fences)
    found = apart(call, call.run(kernels.TORCH), torch.float32)
    assert found <= 1, found
    blocks, seen = call.arguments[2].blocks, []
    for block in blocks:
        own = call.arguments[2].seq_lens[block.sequences].tolist()
        seen += own
        assert block.slots.shape == (len(own), max(own))
        assert block.slots.numel() <= gathered or len(own) == 1
        assert len(blocks) == 1 or 2 * min(own) >= max(own)
    assert sorted(seen) == sorted(lengths)


def test_lengths_on_the_host_need_no_synchronisation(monkeypatch: pytest.MonkeyPatch):
    """One sequence that is far longer than the others costs what it reads, not as much for each of them."""
    lengths = [131072, *[500] * 63]
    page_table = torch.zeros(64, 4096, dtype=torch.int32)
    decode = DecodeMetadata(page_table, torch.tensor(lengths, dtype=torch.int32), 32, lengths)
    for name in ("tolist", "item", "__int__", "__bool__"):
        monkeypatch.setattr(Tensor, name, lambda *_: pytest.fail("the host synchronises"))
    assert [tuple(block.slots.shape) for block in decode.blocks] == [(1, 131072), (63, 500)]


def test_splits_fill_the_machine_and_are_not_too_short():
    assert mla.default_splits(1, 1, 131072, 132) == 264
    assert mla.default_splits(1, 1, 2048, 132) == 32
    assert mla.default_splits(4, 1, 4096, 132) == 64
    assert mla.default_splits(8, 1, 4096, 132) == 16
    assert mla.default_splits(32, 1, 4096, 132) == 8
    assert mla.default_splits(128, 1, 4096, 132) == 2
    assert mla.default_splits(1000, 1, 4096, 132) == 1
    assert mla.default_splits(1, 1, 5, 132) == 1


def test_unwritten_entries_stay_as_they_are(fences: Fences):
    call = fenced(Inputs(ODD, torch.bfloat16).mla_prepare(5, unwritten=1), fences)
    before = call.arguments[4].clone()
    *_, after = call.run(TRITON)
    touched = (before != after).any(-1).flatten().nonzero().flatten().tolist()
    assert touched == sorted(call.arguments[5][:4].tolist())
    (*_, wanted), width = call.twin(), before.shape[-1]
    found = distance(after.view(-1, width)[touched], wanted.view(-1, width)[touched])
    assert found <= call.tolerance(torch.bfloat16)


@pytest.mark.parametrize("decoding", [0, 1, 16, 17, 20])
def test_tokens_of_chunks_are_not_absorbed(decoding: int):
    """Each token has the same bits wherever it stands among those that decode and those that do not."""
    call = Inputs(ODD, torch.float32).mla_prepare(20)
    whole, _, kv_cache = call.run(TRITON)
    call = with_arguments(call, lambda values: values.__setitem__(7, decoding))
    absorbed, rotated, same = call.run(TRITON)
    assert torch.equal(absorbed, whole[:decoding])
    assert torch.equal(rotated, whole[decoding:, :, ODD.rank :])
    assert torch.equal(same, kv_cache)


def test_what_the_kernels_do_not_take():
    inputs = Inputs(ODD, torch.float32)
    attention = inputs.mla_decode([5])
    gaps = torch.zeros(4, ODD.page_size, 2 * (ODD.rank + ODD.rope))[..., : ODD.rank + ODD.rope]
    with pytest.raises(ValueError, match="contiguous"):
        with_arguments(attention, lambda values: values.__setitem__(1, gaps)).run(TRITON)
    with pytest.raises(ValueError, match="contiguous"):
        arguments = list(inputs.mla_prepare(2).arguments)
        TRITON.mla_prepare(*arguments[:4], gaps, *arguments[5:])
    chunk = inputs.mla_prefill(2, 5)
    with pytest.raises(ValueError, match="contiguous"):
        with_arguments(chunk, _changed(0, lambda query: query.mT.contiguous().mT)).run(TRITON)
    call = inputs.moe(2)
    narrow = tuple(each[: ODD.shared - 1] for each in call.arguments[5][:2])
    with pytest.raises(ValueError, match="multiple"):
        TRITON.moe(*call.arguments[:5], (*narrow, call.arguments[5][2][:, :-1]))
    with pytest.raises(ValueError, match="contiguous"):
        TRITON.moe(call.arguments[0], call.arguments[1].T.contiguous().T, *call.arguments[2:])


def test_no_tokens():
    inputs = Inputs(ODD, torch.float32)
    attention = inputs.mla_decode([]), inputs.mla_prefill(0, 9)
    for call in (inputs.add_rms_norm(0), inputs.norm_router(0), inputs.moe(0), *attention):
        assert all(result.shape[0] == 0 for result in call.run(TRITON))
    assert all(result.shape[0] == 0 for result in inputs.mla_prepare(0).run(TRITON)[:2])


@pytest.mark.parametrize(
    "case", ["router, 16 tokens", "attention, pages shared", "norm of many rows", "prefill, a chunk"]
)
def test_the_same_bits_again(case: str):
    call = CASES[case](torch.bfloat16)
    assert all(map(torch.equal, call.run(TRITON), call.run(TRITON)))


def test_reading_or_writing_out_of_bounds_is_seen():
    """By the interpreter as it is set up here, so that no kernel does so unseen."""
    states, weight = torch.ones(2, 16), torch.ones(16)

    def launch(weight: Tensor, normed: Tensor) -> None:
        kernel: Any = norm._add_rms_norm
        kernel[(2,)](states, states, weight, states, normed, 16, 0.0, HAS_DELTA=False, BLOCK=16)

    launch(weight, states.clone())
    with pytest.raises(InterpreterError, match="reads out of bounds"):
        launch(weight[:15], states.clone())
    with pytest.raises(InterpreterError, match="writes out of bounds"):
        launch(weight, states[:1].clone())


# Planted mistakes: a twin with a fault in it has to be told from the kernel, or the tolerances are too wide.


def _swapped(index: int, other: int) -> Callable[[list[Any]], None]:
    def change(values: list[Any]) -> None:
        values[index], values[other] = values[other], values[index]

    return change


def _changed(index: int, change: Callable[[Any], Any]) -> Callable[[list[Any]], None]:
    return lambda values: values.__setitem__(index, change(values[index]))


def _halves_swapped(gate_up: Tensor) -> Tensor:
    return torch.cat(gate_up.chunk(2, dim=1)[::-1], dim=1)


def _turned_back(rope: Tensor) -> Tensor:
    cos, sin = rope.chunk(2, dim=-1)
    return torch.cat((cos, -sin), dim=-1)


def _unlike(values: Tensor) -> Tensor:
    return values.roll(1, 0)


MISTAKES: dict[str, tuple[str, Callable[[list[Any]], None]]] = {
    "delta left out": ("norm of many rows", _changed(1, lambda delta: None)),
    "norm's weight left out": ("norm of many rows", _changed(2, torch.ones_like)),
    "epsilon of the wrong size": ("norm of small values", _changed(3, lambda eps: eps / 10)),
    "bias left out": ("router, 16 tokens", _changed(5, torch.zeros_like)),
    "one expert too few": ("router, 16 tokens", _changed(6, lambda top_k: top_k - 1)),
    "weights not scaled": ("router, 16 tokens", _changed(7, lambda scaling: 1.0)),
    "delta left out before the router": ("router, 16 tokens", _changed(1, torch.zeros_like)),
    "router's norm weight left out": ("router, 16 tokens", _changed(2, torch.ones_like)),
    "gate and up swapped": ("experts", _changed(3, _halves_swapped)),
    "weights of another token": ("experts", _changed(2, _unlike)),
    "experts of another token": ("experts", _changed(1, _unlike)),
    "slots of a token swapped": ("experts", _changed(1, lambda topk_ids: topk_ids.flip(1))),
    "shared experts left out": ("experts", _changed(5, lambda shared: None)),
    "shared gate and up swapped": ("experts", _changed(5, lambda shared: (shared[1], shared[0], shared[2]))),
    "half of the shared experts": ("experts", _changed(5, lambda shared: (shared[0], shared[1], shared[2] * 0.5))),
    "cosine and sine swapped": ("prepare, tokens without a slot", _changed(3, lambda rope: rope.roll(ODD.rope, 1))),
    "sine negated": ("prepare, tokens without a slot", _changed(3, _turned_back)),
    "another slot": ("prepare, tokens without a slot", _changed(5, lambda slot_mapping: slot_mapping.roll(1))),
    "latent's weight left out": ("prepare, tokens without a slot", _changed(2, torch.ones_like)),
    "rotary part first": ("prepare, tokens without a slot", _changed(0, lambda joined: joined.roll(ODD.rope, 1))),
    "another head's key": ("prepare, tokens without a slot", _changed(1, _unlike)),
    "one cached token too few": (
        "attention, pages shared",
        _changed(2, lambda decode: dataclasses.replace(decode, seq_lens=decode.seq_lens - 1)),
    ),
    "pages in another order": (
        "attention, pages shared",
        _changed(2, lambda decode: dataclasses.replace(decode, page_table=decode.page_table.roll(1, 1).clamp(min=0))),
    ),
    "scores not scaled": ("attention, pages shared", _changed(3, lambda scale: 1.0)),
    "another head's matrix": ("attention, pages shared", _changed(4, _unlike)),
    "the diagonal off by one": (
        "prefill, a chunk",
        lambda values: values.__setitem__(slice(2, 4), [values[2][:-1], values[3][:-1]]),
    ),
    "rotary key left out": ("prefill, a chunk", _changed(2, torch.zeros_like)),
    "rotary query left out": ("prefill, a chunk", _changed(1, torch.zeros_like)),
    "scores of a chunk not scaled": ("prefill, a chunk", _changed(5, lambda scale: 1.0)),
    "heads of a chunk in another order": ("prefill, a chunk", _changed(0, lambda query: query.roll(1, 1))),
    "rotary part left out": (
        "attention, pages shared",
        _changed(0, lambda query: F.pad(query[..., : ODD.rank], (0, ODD.rope))),
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_planted_mistakes_are_seen(mistake: str, dtype: torch.dtype):
    case, plant = MISTAKES[mistake]
    call, results = _sound(case, dtype)
    assert apart(call, results, dtype) <= 1
    assert apart(with_arguments(call, plant), results, dtype) > 3


@functools.cache
def _sound(case: str, dtype: torch.dtype) -> tuple[Call, tuple[Tensor, ...]]:
    if case == "experts":
        call = Inputs(ODD, dtype).moe(3)
        return call, call.run(TRITON, plan=PLANS["blocks of 16"])
    if case == "norm of small values":
        call = with_arguments(
            Inputs(ODD, dtype).add_rms_norm(2, delta=False), _changed(0, lambda states: states * 1e-3)
        )
    else:
        call = CASES[case](dtype)
    return call, call.run(TRITON)


def test_a_router_that_chooses_worse_is_seen():
    """The comparison that allows for ties allows for nothing else."""
    call = Inputs(ODD, torch.float32).norm_router(9)
    total, normed, topk_ids, topk_weights = call.run(TRITON)

    def found(*choice: Tensor) -> float:
        return routed_alike((normed.double(), *(each.double() for each in call.arguments[4:6]), 3, 1.7), choice)

    assert found(topk_ids, topk_weights) < 1e-6
    assert found(topk_ids.roll(1, 0), topk_weights) > 1e-2
    assert found(topk_ids, topk_weights.flip(-1)) > 1e-2
    assert found(topk_ids[:, :1].expand(-1, 3), topk_weights) == float("inf")
    assert apart(call, (total, normed, topk_ids, topk_weights), torch.float32, ties=True) <= 1
    assert apart(call, (total, normed * 1.001, topk_ids, topk_weights), torch.float32, ties=True) > 1


# The twin


def test_the_reference_keeps_float64():
    inputs = Inputs(ODD, torch.float64)
    for call in (inputs.add_rms_norm(2), inputs.norm_router(2), inputs.moe(2), inputs.mla_prepare(2)):
        results = call.run(kernels.REFERENCE)
        assert all(result.dtype == torch.float64 for result in results if result.is_floating_point())
    # float32 anywhere on the way would leave differences of 1e-8
    states, *rest = Inputs(ODD, torch.float64).add_rms_norm(4).arguments
    _, normed = reference.add_rms_norm(states, None, rest[1], 0.0)
    _, scaled = reference.add_rms_norm(states * 3, None, rest[1], 0.0)
    assert distance(scaled, normed) < 1e-15


# The table


def test_ways_that_are_asked_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    assert (
        kernels.select_ops("cpu")
        is kernels.select_ops("cpu", "auto")
        is kernels.select_ops("cuda", "torch")
        is kernels.TORCH
    )
    with pytest.raises(ValueError, match="what for"):
        kernels.select_ops("cuda")
    monkeypatch.setenv(kernels.VARIABLE, "triton")
    assert kernels.select_ops("cuda").name == kernels.select_ops("cpu").name == "triton"
    assert kernels.select_ops("cuda", "torch").name == "torch"
    monkeypatch.setenv(kernels.VARIABLE, "fast")
    with pytest.raises(ValueError, match="'fast'"):
        kernels.select_ops("cpu")
    monkeypatch.setenv(kernels.VARIABLE, "triton")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(RuntimeError, match="not on cpu"):
        kernels.select_ops("cpu")


def python(program: str, **variables: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join((str(ROOT), str(ROOT / "scripts")))
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment | {"PYTHONPATH": path} | variables,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


@pytest.mark.slow
def test_triton_is_imported_only_when_chosen_and_missing_it_is_said_clearly():
    program = """
import sys
from kimi_vl import kernels
kernels.select_ops("cuda", "torch")
print("triton" in sys.modules)
sys.modules["triton"] = None
try:
    kernels.select_ops("cuda")
except RuntimeError as error:
    print(error)
"""
    first, said = python(program, KIMI_VL_KERNELS="triton").splitlines()
    assert first == "False"
    assert "install triton" in said
    assert "KIMI_VL_KERNELS" in said
