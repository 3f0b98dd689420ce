"""Attention by FlashAttention, with stand-ins that have the signatures of its two packages and refuse what they do."""

from __future__ import annotations

import logging
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_vl import kernels
from kimi_vl.engine.engine import Engine
from kimi_vl.kernels import flash_attention, startup_check
from kimi_vl.model import vision
from kimi_vl.weights import loader
from tests.parity.test_engine import CHECKPOINT, SMALL, ask, some_requests

CPU = torch.device("cpu")
PACKAGES = ["flash_attn", "flash_attn.cute"]


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool) -> Tensor:
    """Tokens before heads; queries stand at the end of the keys."""
    mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1]) if causal else None
    q, k, v = (each.transpose(1, 2) for each in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)


def attend_packed(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: int, scale: float | None) -> Tensor:
    assert ends.dtype == torch.int32 and longest == int(ends.diff().max())
    parts = zip(*(each.split(ends.diff().tolist()) for each in (q, k, v)), strict=True)
    return torch.cat([attend(a[None], b[None], c[None], scale, False)[0] for a, b, c in parts])


class Flash2:
    """flash_attn 2.8: one head dim for all, and a tensor comes back."""

    def __init__(self):
        self.calls: list[str] = []

    def flash_attn_func(
        self, q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
        alibi_slopes=None, deterministic=False, return_attn_probs=False,
    ):  # fmt: skip
        self.calls.append("func")
        assert q.shape[-1] == k.shape[-1] == v.shape[-1] <= 256 and dropout_p == 0.0
        return attend(q, k, v, softmax_scale, causal)

    def flash_attn_varlen_func(
        self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
        return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        self.calls.append("varlen")
        assert torch.equal(cu_seqlens_q, cu_seqlens_k) and max_seqlen_q == max_seqlen_k and not causal
        return attend_packed(q, k, v, cu_seqlens_q, max_seqlen_q, softmax_scale)


class Flash4:
    """flash-attn-4 4.0.0b36: other arguments follow the values, head dims as on capability 9, and a pair comes back."""

    def __init__(self):
        self.calls: list[str] = []

    def flash_attn_func(
        self, q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False, window_size=(None, None),
        learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, score_mod=None,
        score_mod_bwd=None, mask_mod=None, aux_tensors=None, aux_scalars=None, block_sparse_tensors=None,
        block_sparse_tensors_bwd=None, return_lse=False, gather_bwd_recompute_p=False, gather_bwd_token_chunk=None,
    ):  # fmt: skip
        self.calls.append("func")
        assert qv is None and all(each.shape[-1] % 8 == 0 and 8 <= each.shape[-1] <= 256 for each in (q, k, v))
        assert v.shape[-1] <= q.shape[-1]
        return attend(q, k, v, softmax_scale, causal), None

    def flash_attn_varlen_func(
        self, q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
        min_seqlen_k=None, seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None,
        softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1,
        pack_gqa=None, deterministic=False, score_mod=None, score_mod_bwd=None, mask_mod=None,
        block_sparse_tensors=None, aux_tensors=None, aux_scalars=None, return_lse=False, scheduler_metadata=None,
        seqlen_k_per_split=None, disable_scheduler_metadata=False, gather_bwd_recompute_p=False,
        gather_bwd_token_chunk=None,
    ):  # fmt: skip
        self.calls.append("varlen")
        assert qv is None and cu_seqlens_q is not None and max_seqlen_q is not None and not causal
        return attend_packed(q, k, v, cu_seqlens_q, max_seqlen_q, softmax_scale), None


@pytest.fixture
def installed(monkeypatch) -> Iterator[Any]:
    """Puts stand-ins in the place of the packages, on a card of some capability that is the CPU."""

    def install(capability: tuple[int, int], **packages: Any) -> None:
        for name in PACKAGES:
            monkeypatch.setitem(sys.modules, name, packages.get(name.replace(".", "_")))
        majors = dict(flash_attention._MAJORS)
        monkeypatch.setattr(
            flash_attention,
            "candidates",
            lambda device: [name for name, known in majors.items() if capability[0] in known],
        )
        flash_attention._package.cache_clear()

    monkeypatch.setattr(flash_attention, "_refused", set())
    yield install
    flash_attention._package.cache_clear()


@pytest.mark.parametrize(
    ("capability", "taken"), [((8, 0), 2), ((8, 9), 2), ((9, 0), 4), ((10, 0), 4), ((12, 0), 2), ((7, 5), 0)]
)
def test_each_card_gets_the_package_that_is_for_it(capability, taken, installed):
    two, four = Flash2(), Flash4()
    installed(capability, flash_attn=two, flash_attn_cute=four)
    package = flash_attention._package(CPU)
    assert package is None if not taken else package == flash_attention.Package(
        taken == 4, (four if taken == 4 else two).flash_attn_func, (four if taken == 4 else two).flash_attn_varlen_func
    )  # fmt: skip
    installed(capability, flash_attn=two)  # without the newer one
    assert (flash_attention._package(CPU) is None) == (not taken)
    installed(capability)
    assert flash_attention._package(CPU) is None


def test_an_installation_of_the_newer_one_alone_is_no_older_one(installed):
    installed((8, 0), flash_attn=types.SimpleNamespace())  # a namespace without functions
    assert flash_attention._package(CPU) is None


def test_half_precision_on_a_gpu(installed):
    installed((9, 0), flash_attn=Flash2())
    assert not flash_attention.usable(torch.zeros(1, dtype=torch.bfloat16))
    for dtype, taken in ((torch.bfloat16, True), (torch.float16, True), (torch.float32, False)):
        states: Any = types.SimpleNamespace(is_cuda=True, dtype=dtype, device=CPU)
        assert flash_attention.usable(states) == taken


def faulty(kind: type, fault: str) -> Any:
    class Faulty(kind):
        def flash_attn_func(self, *given, **named):
            if fault == "raises":
                raise RuntimeError("no kernel image is available")
            if fault == "not causal":
                named["causal"] = False
            return super().flash_attn_func(*given, **named)

        def flash_attn_varlen_func(self, *given, **named):
            if fault == "not apart":
                whole = torch.tensor([0, len(given[0])], dtype=torch.int32)
                named |= dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), whole)
                named |= dict.fromkeys(("max_seqlen_q", "max_seqlen_k"), len(given[0]))
            return super().flash_attn_varlen_func(*given, **named)

    return Faulty()


@pytest.mark.parametrize("fault", ["raises", "not causal", "not apart"])
def test_one_that_fails_or_computes_something_else_gives_way_with_one_line(fault, installed, caplog):
    two = Flash2()
    installed((9, 0), flash_attn=two, flash_attn_cute=faulty(Flash4, fault))
    with caplog.at_level(logging.WARNING):
        package = flash_attention._package(CPU)
        assert flash_attention._package(CPU) is package
    assert package is not None and package.function == two.flash_attn_func
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("flash_attn.cute is not used: it")


def test_what_the_check_at_start_refuses_is_not_tried_again(installed, monkeypatch, caplog):
    """Such as one that hangs, which only a process of its own survives."""
    two, four = Flash2(), Flash4()
    installed((9, 0), flash_attn=two, flash_attn_cute=four)
    said = {"flash_attn.cute": "a call does not end within 60 s"}
    monkeypatch.setattr(startup_check, "refusals", lambda device, use: said)
    monkeypatch.setattr(kernels, "triton_ops", lambda: kernels.REFERENCE)
    model = loader.load(CHECKPOINT, dtype=torch.float32)
    ops = kernels._automatic(CPU, SMALL.use(model), kernels.triton_ops)
    assert ops is kernels.REFERENCE
    package = flash_attention._package(CPU)
    assert package is not None and package.function == two.flash_attn_func and not four.calls
    assert [line.getMessage() for line in caplog.records] == [
        "flash_attn.cute is not used: a call does not end within 60 s"
    ]


@pytest.mark.parametrize("name", PACKAGES)
@pytest.mark.parametrize(("dims", "values"), [(24, 16), (16, 16), (16, 24)])
def test_values_may_have_fewer_or_more_dims_than_keys(name, dims, values, installed):
    installed((9, 0), **{name.replace(".", "_"): Flash2() if name == "flash_attn" else Flash4()})
    generator = torch.Generator().manual_seed(3)
    query, key, value = (
        torch.randn(2, 3, *shape, generator=generator) for shape in ((5, dims), (9, dims), (9, values))
    )
    due = F.scaled_dot_product_attention(query, key, value, torch.ones(5, 9, dtype=torch.bool).tril(4), scale=0.3)
    assert (flash_attention.causal(query, key, value, 0.3) - due).abs().max() < 1e-5


@pytest.mark.parametrize("name", PACKAGES)
def test_prompts_and_pictures_give_the_same_tokens(name, installed, monkeypatch):
    stand_in = Flash2() if name == "flash_attn" else Flash4()
    installed((9, 0), **{name.replace(".", "_"): stand_in})
    engine = Engine(loader.load(CHECKPOINT, dtype=torch.float32), 1024, replace(SMALL, prefix_caching=False))
    wanted = [ask(engine, *request, max_new_tokens=5) for request in some_requests()]
    assert not stand_in.calls
    monkeypatch.setattr(flash_attention, "usable", lambda states: True)
    engine._embeddings._kept.clear()
    assert [ask(engine, *request, max_new_tokens=5) for request in some_requests()] == wanted
    assert {"func", "varlen"} <= set(stand_in.calls)
    engine.close()


@pytest.mark.parametrize("name", PACKAGES)
@pytest.mark.parametrize("lengths", [[12], [4, 4, 4], [5, 1, 6]])
def test_pictures_stay_apart(name, lengths, installed, monkeypatch):
    installed((9, 0), **{name.replace(".", "_"): Flash2() if name == "flash_attn" else Flash4()})
    query, key, value = torch.randn(3, 12, 2, 8)
    monkeypatch.setattr(flash_attention, "usable", lambda states: True)
    found = vision.attention(query, key, value, lengths)
    monkeypatch.setattr(flash_attention, "usable", lambda states: False)
    torch.testing.assert_close(found, vision.attention(query, key, value, lengths), rtol=1e-5, atol=1e-6)
