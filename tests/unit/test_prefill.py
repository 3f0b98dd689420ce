"""Attention of prompts' chunks: every border of blocks, what no query may see, and torch without cuDNN's attention."""

from __future__ import annotations

import dataclasses
import os
from contextlib import contextmanager
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest

from bench_suite import triton_on_cpu  # isort: skip

assert triton_on_cpu.interpreter  # it comes before any kernel

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch.nn.attention import SDPBackend  # noqa: E402

from kimi_vl import kernels  # noqa: E402
from kimi_vl.kernels import Widths, sdpa  # noqa: E402
from kimi_vl.kernels.attention_metadata import PrefillChunk  # noqa: E402
from kimi_vl.kernels.inputs import Inputs, apart, distance, with_arguments  # noqa: E402
from kimi_vl.kernels.triton import prefill  # noqa: E402
from kimi_vl.kernels.triton.prefill import FEW, FLOAT32, NARROW, SOME, WIDE, Plan  # noqa: E402

# numbers that are not finite are put in on purpose
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
FUZZ = int(os.environ.get("KIMI_VL_FUZZ", "0"))
TINY = Widths(heads=2, rank=24, rope=6, nope=10, value=12, page_size=8)  # values are wider than keys
ONE_HEAD = dataclasses.replace(TINY, heads=1)
TRITON = kernels.select_ops("cpu", "triton")
SMALL = [Plan(16, 16, 4, 1), Plan(16, 32, 4, 1), Plan(32, 16, 4, 1)]
BORDERS = [0, 1, 15, 16, 17, 31, 32, 33]


def held(tokens: int, before: int, plan: Plan, widths: Widths = ONE_HEAD, seed: int = 0) -> None:
    call = Inputs(widths, torch.float32, seed=seed).mla_prefill(tokens, before + tokens)
    assert apart(call, call.run(TRITON, plan=plan), torch.float32) <= 1, (tokens, before, plan)


@pytest.mark.parametrize("plan", SMALL, ids=str)
@pytest.mark.parametrize("before", BORDERS)
def test_borders_of_blocks(before: int, plan: Plan):
    for tokens in (1, 16, 17, 33):
        held(tokens, before, plan)


@pytest.mark.parametrize("before", [*range(0, 66, 3)] if FUZZ else [0, 5, 46])
def test_chunks_of_any_length(before: int):
    """From 1 to 40 tokens; a few of them where the test has to be short."""
    for tokens in range(1, 41) if FUZZ else (3, 14, 29, 40):
        held(tokens, before, SMALL[(tokens + before) % len(SMALL)])


def test_any_shape():
    """KIMI_VL_FUZZ is of how many chunks."""
    draw = Random(7)
    for seed in range(FUZZ or 4):
        widths = Widths(
            heads=draw.randint(1, 3), rank=draw.randint(1, 40), rope=2 * draw.randint(1, 20), nope=draw.randint(1, 40),
            value=draw.randint(1, 40), page_size=8,
        )  # fmt: skip
        held(draw.randint(1, 90), draw.choice([0, draw.randint(0, 150)]), draw.choice([*SMALL, WIDE]), widths, seed)


@pytest.mark.parametrize("ops", [TRITON, kernels.TORCH], ids=lambda ops: ops.name)
@pytest.mark.parametrize("sharpness", [0.001, 30.0, 3000.0])
def test_any_scores(sharpness: float, ops: kernels.Ops):
    """From all equal to a single token that has all the weight, far beyond what e^x can be; the error of a score grows
    with it, and softmax makes it one of a weight."""
    call = Inputs(TINY, torch.float32).mla_prefill(20, 50)
    call = with_arguments(call, lambda values: values.__setitem__(5, values[5] * sharpness))
    assert apart(call, call.run(ops), torch.float32) <= max(1, 0.3 * sharpness)


@pytest.mark.parametrize("ops", [TRITON, kernels.TORCH], ids=lambda ops: ops.name)
@pytest.mark.parametrize("before", [0, 30])
def test_nothing_of_later_tokens_is_seen(before: int, ops: kernels.Ops):
    """Whatever follows a token in its chunk, its own result keeps its bits."""
    call = Inputs(TINY, torch.float32).mla_prefill(40, before + 40)
    (whole,) = call.run(ops)
    for last in (0, 15, 16, 17, 38):
        changed = [value.clone() if isinstance(value, torch.Tensor) else value for value in call.arguments]
        for value in changed[2:4]:
            value[before + last + 1 :] = 1e4
        found = ops.mla_prefill(*changed)
        assert torch.equal(found[: last + 1], whole[: last + 1]), last
        assert not torch.equal(found[last + 1], whole[last + 1])


def test_a_spoilt_token_spoils_only_itself():
    call = Inputs(TINY, torch.float32).mla_prefill(20, 50)
    (clean,) = call.run(TRITON)
    call.arguments[0][3] = float("nan")
    (spoilt,) = call.run(TRITON)
    others = [token for token in range(20) if token != 3]
    assert spoilt[3].isnan().all()
    assert torch.equal(spoilt[others], clean[others])


def test_chunks_of_a_prompt_are_the_prompt():
    """Each token has the same result, whichever chunk it comes in."""
    call = Inputs(TINY, torch.float32).mla_prefill(70, 70)
    query, rotated, latents, expanded, chunk, scale = call.arguments
    (whole,) = call.run(TRITON)
    parts = []
    for begin, end in ((0, 31), (31, 33), (33, 70)):
        own, past = PrefillChunk(slice(begin, end), chunk.pages, end), (latents[:end], expanded[:end])
        parts.append(TRITON.mla_prefill(query[begin:end], rotated[begin:end], *past, own, scale))
    assert distance(torch.cat(parts), whole) < 1e-6


@pytest.mark.parametrize(
    ("tokens", "itemsize", "shared_memory", "plan"),
    [(2, 2, 232_448, FEW), (16, 2, 101_376, FEW), (17, 2, 101_376, NARROW), (1024, 2, 166_912, NARROW),
     (17, 2, 232_448, SOME), (256, 2, 232_448, SOME), (257, 2, 232_448, WIDE),
     (1024, 2, 232_448, WIDE), (1024, 4, 232_448, FLOAT32), (2, 4, 101_376, FLOAT32)],
)  # fmt: skip
def test_plans_by_size_and_card(tokens: int, itemsize: int, shared_memory: int, plan: Plan):
    assert prefill.choose_plan(tokens, itemsize, shared_memory) == plan


# PyTorch's


def test_a_mask_is_made_once_and_only_for_those_that_ask():
    chunk = PrefillChunk(slice(4, 7), torch.arange(2), 5)
    assert "mask" not in vars(chunk)
    call = Inputs(TINY, torch.float32).mla_prefill(3, 9)
    call.run(TRITON)
    assert "mask" not in vars(call.arguments[4])
    assert chunk.mask is chunk.mask
    assert chunk.mask is not None
    assert chunk.mask.tolist() == [[True] * 3 + [False] * 2, [True] * 4 + [False], [True] * 5]
    assert PrefillChunk(slice(4, 7), torch.arange(2), 3).mask is None


def test_torch_is_kept_from_cudnn_on_a_gpu_alone(monkeypatch: pytest.MonkeyPatch):
    allowed: list[Any] = []

    @contextmanager
    def backends(chosen: Any) -> Any:
        allowed.append(chosen)
        yield

    monkeypatch.setattr(sdpa, "sdpa_kernel", backends)
    query, key, value = torch.randn(3, 1, 2, 4, 8).unbind()
    wanted = F.scaled_dot_product_attention(query, key, value)
    assert torch.equal(sdpa.attention(query, key, value), wanted)
    assert not allowed
    monkeypatch.setattr(sdpa.F, "scaled_dot_product_attention", lambda *given, **named: wanted)
    on_gpu: Any = SimpleNamespace(is_cuda=True, shape=(1, 2, 4, 8))
    assert sdpa.attention(on_gpu, on_gpu, on_gpu) is wanted
    (chosen,) = allowed
    assert SDPBackend.CUDNN_ATTENTION not in chosen
    assert set(chosen) == {SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [4, 8, 12])
def test_values_of_any_width(width: int, dtype: torch.dtype):
    """Narrower than keys, where a CPU pads them in bfloat16, and wider."""
    query, key = torch.randn(2, 1, 2, 9, 8).to(dtype).unbind()
    value = torch.randn(1, 2, 9, width).to(dtype)
    found = sdpa.attention(query, key, value, causal=True, scale=0.3)
    right = F.scaled_dot_product_attention(query.double(), key.double(), value.double(), is_causal=True, scale=0.3)
    assert found.shape == right.shape
    assert distance(found, right) < (1e-5 if dtype == torch.float32 else 2.0**-7)
