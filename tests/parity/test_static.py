"""The decoder through a table of operations, and steps over buffers that stay, against the model and its engine."""

from __future__ import annotations

import copy
import logging
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kimi_vl import kernels
from kimi_vl.engine import cuda_graphs, kv_cache, sampling
from kimi_vl.engine.cuda_graphs import StaticDecoder
from kimi_vl.engine.decoder import FusedDecoder, _Projections, naive_joined
from kimi_vl.engine.engine import Engine, EngineOptions
from kimi_vl.engine.kv_cache import Chunk, PagedCache
from kimi_vl.engine.sampling import Sampling
from kimi_vl.kernels import linear
from kimi_vl.kernels.cpu import build
from kimi_vl.model.kimi_vl import KimiVL
from kimi_vl.model.latent_cache import LatentCache
from kimi_vl.quantization.weight import BlockedWeight
from kimi_vl.weights import loader
from tests.parity.test_engine import (
    CHECKPOINT,
    SMALL,
    Held,
    Listener,
    ask,
    ids_of,
    image,
    send,
    settle,
    some_requests,
    with_image,
)

SAMPLINGS = [Sampling(0, 1, 0, 0), Sampling(1, 1, 0, 5), Sampling(0.8, 0.9, 0, 6), Sampling(1.5, 1, 20, 7)]


@pytest.fixture(scope="module")
def model() -> KimiVL:
    return loader.load(CHECKPOINT, dtype=torch.float32)


@pytest.fixture(scope="module")
def plain(model) -> Iterator[Engine]:
    engine = Engine(model, 1024, SMALL)
    yield engine
    engine.close()


def with_buffers(model: KimiVL, capture=None, options: EngineOptions = SMALL, text_tokens: int = 1024) -> Engine:
    """An engine that decodes as it does on a GPU, but for the graphs and the kernels."""
    return Engine(copy.deepcopy(model), text_tokens, options, ops=kernels.REFERENCE, capture=capture)


@pytest.fixture
def engine(model) -> Iterator[Engine]:
    engine = with_buffers(model)
    yield engine
    engine.close()


NATIVE = pytest.mark.skipif(
    not set(build.NEEDED) <= build.processor_features(), reason="this processor has no AVX-512 or no VNNI"
)


def ops(name: str) -> kernels.Ops:
    if name == "triton":
        from bench_suite import triton_on_cpu

        assert triton_on_cpu.interpreter
    return kernels.select_ops("cpu", name)


# The decoder


@torch.inference_mode()
def test_the_merged_projection_is_both_of_them(model):
    """One GEMM for the queries and for what is cached, whose parts stay the model's own weights."""
    attention = copy.deepcopy(model.language_model.model.layers[1].self_attn)
    normed = torch.randn(5, attention.config.hidden_size, generator=torch.Generator().manual_seed(1)).to(model.dtype)
    right = naive_joined(attention, normed)
    merged = _Projections(attention, kernels.TORCH)
    assert isinstance(merged.joined, Tensor)
    torch.testing.assert_close(linear.project(normed, merged.joined), right)
    torch.testing.assert_close(naive_joined(attention, normed), right)
    assert attention.kv_a_proj_with_mqa.weight.untyped_storage().data_ptr() == merged.joined.data_ptr()


@torch.inference_mode()
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["torch", "triton", pytest.param("native", marks=NATIVE)])
def test_the_fused_decoder_is_the_model(model, name, dtype):
    """Single tokens and chunks, with and without a past, in one step; the KV cache that is written is compared, too."""
    exact, half = copy.deepcopy(model).double(), copy.deepcopy(model).to(getattr(torch, dtype))
    text = model.config.text_config
    width = text.kv_lora_rank + text.qk_rope_head_dim
    past = torch.randn(text.num_hidden_layers, 9, 8, width, generator=torch.Generator().manual_seed(3))
    chunks = [Chunk([7, 2, 4], 16, 17), Chunk([3], 4, 5), Chunk([5, 1], 6, 11), Chunk([0, 6], 0, 9)]
    ids = torch.tensor(ids_of(sum(chunk.end - chunk.begin for chunk in chunks)))

    def fused() -> tuple[Tensor, Tensor, Tensor]:
        cache = PagedCache(text, 9, 8, dtype=half.dtype)
        cache.kv_cache.copy_(past.bfloat16())
        decoder = FusedDecoder(copy.deepcopy(half).language_model, ops(name))
        states = decoder.states(half.embed(ids), cache.step(chunks))
        return states.double(), decoder.logits(states).double(), cache.kv_cache.double()

    def model_alone(of: KimiVL) -> tuple[Tensor, Tensor, Tensor]:
        """Each chunk by itself, in a plain cache that begins as its pages do."""
        states, kv_cache, first = [], past.bfloat16().double(), 0
        for chunk in chunks:
            cache, new = LatentCache(text, 1, 24, dtype=of.dtype), ids[first : first + chunk.end - chunk.begin]
            own = kv_cache[:, chunk.pages].flatten(1, 2)  # (layers, capacity, R+P)
            cache._states[:, 0, : chunk.begin] = own[:, : chunk.begin].to(of.dtype)
            positions = torch.arange(chunk.begin, chunk.end).unsqueeze(0)
            states.append(of.language_model(of.embed(new.unsqueeze(0)), positions, cache)[0])
            own[:, chunk.begin : chunk.end] = cache._states[:, 0, chunk.begin : chunk.end].double()
            kv_cache[:, chunk.pages] = own.unflatten(1, (-1, 8))
            first += len(new)
        return torch.cat(states).double(), of.language_model.lm_head(torch.cat(states)).double(), kv_cache

    wanted, beside = model_alone(exact), model_alone(half)
    for found, plainly, right in zip(fused(), beside, wanted, strict=True):
        away, allowed = (found - right).norm() / right.norm(), (plainly - right).norm() / right.norm()
        assert away <= 1.5 * allowed + 1e-6, (away, allowed)
        assert allowed > 1e-9  # float64 against itself would show nothing


@NATIVE
@torch.inference_mode()
def test_weights_in_blocks_serve_the_model_and_another_decoder(model):
    text, ids = replace(model.config.text_config, moe_intermediate_size=64), torch.tensor(ids_of(9))
    torch.manual_seed(0)
    half = KimiVL(replace(model.config, text_config=text)).bfloat16().eval()
    positions = torch.arange(9).unsqueeze(0)

    def of_model() -> Tensor:
        return half.language_model(half.embed(ids.unsqueeze(0)), positions, None)[0]

    def of_decoder() -> Tensor:
        cache = PagedCache(text, 9, 8, dtype=half.dtype)
        return FusedDecoder(half.language_model, ops("native")).states(
            half.embed(ids), cache.step([Chunk([0, 3], 0, 9)])
        )

    before, nbytes = of_model(), sum(each.nbytes for each in half.parameters())
    first = of_decoder()
    blocked = {name for name, module in half.named_modules() if isinstance(module, BlockedWeight)}
    assert {name.rpartition("layers.1.")[2] for name in blocked if "layers.1." in name} == {
        "self_attn.q_proj.weight", "self_attn.kv_a_proj_with_mqa.weight", "self_attn.kv_b_proj.weight",
        "self_attn.o_proj.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj",
        *(f"mlp.shared_experts.{name}_proj.weight" for name in ("gate", "up", "down")),
    }  # fmt: skip
    assert sum(each.nbytes for each in half.parameters()) == nbytes
    assert torch.equal(of_model(), before)
    assert torch.equal(of_decoder(), first)
    assert torch.equal(of_model(), before)
    assert (first - before).norm() <= 0.03 * before.norm()


def test_projections_are_joined_without_a_copy(model):
    own = copy.deepcopy(model)
    before = own.state_dict()
    decoder = FusedDecoder(own.language_model, kernels.TORCH)
    for name, value in own.state_dict().items():
        assert torch.equal(value, before[name])
    attention, joined = own.language_model.model.layers[0].self_attn, decoder._projections[0].joined
    assert isinstance(joined, Tensor)
    assert attention.q_proj.weight.data_ptr() == joined.data_ptr()
    assert attention.kv_a_proj_with_mqa.weight.untyped_storage().data_ptr() == joined.untyped_storage().data_ptr()


def test_the_caller_is_left_without_a_pool_of_threads(model):
    """Each thread that has computed in parallel keeps one, and two of them slow each other down."""
    widths = {"hidden_size": 512, "num_attention_heads": 8}
    config = replace(model.config, text_config=replace(model.config.text_config, **widths))
    left = []

    def caller() -> None:
        own = loader.empty_model(config).language_model.to_empty(device="cpu")
        before = len(os.listdir("/proc/self/task"))
        FusedDecoder(own, kernels.TORCH)
        end = time.monotonic() + 300  # threads end a moment after they are waited for
        while len(os.listdir("/proc/self/task")) > before and time.monotonic() < end:
            time.sleep(0.01)
        left.append(len(os.listdir("/proc/self/task")) - before)

    thread = threading.Thread(target=caller)
    thread.start()
    thread.join()
    assert left == [0]


@pytest.mark.slow
def test_the_engine_with_kernels_gives_the_same_tokens(model, plain, monkeypatch):
    ops("triton")
    monkeypatch.setenv(kernels.VARIABLE, "triton")
    engine = Engine(copy.deepcopy(model), 1024, SMALL)
    assert engine.ops.name == "triton" and engine.static_decoder is None
    requests = [some_requests()[index] for index in (2, 6, 8)]
    sent = [send(engine, *request, max_new_tokens=4, sampling=SAMPLINGS[n])[0] for n, request in enumerate(requests)]
    found = [listener.result() for listener in sent]
    assert found == [
        ask(plain, *request, max_new_tokens=4, sampling=SAMPLINGS[n]) for n, request in enumerate(requests)
    ]
    engine.close()


def test_kernels_and_graphs_are_chosen_by_variables(model, monkeypatch):
    for name, value, message in [
        (kernels.VARIABLE, "fast", "'auto', 'torch', 'native' or 'triton', not 'fast'; change KIMI_VL_KERNELS"),
        (cuda_graphs.VARIABLE, "yes", "0 or 1, not 'yes'"),
    ]:
        with monkeypatch.context() as patch, pytest.raises(ValueError, match=message):
            patch.setenv(name, value)
            Engine(model, 1024, SMALL)
    monkeypatch.setenv(cuda_graphs.VARIABLE, "0")
    assert not cuda_graphs.wanted()
    assert Engine(model, 1024, SMALL).ops is kernels.TORCH


# Steps over buffers that stay


def test_results_are_batch_invariant(plain, engine):
    requests = [(ids, patches, SAMPLINGS[n % 4]) for n, (ids, patches) in enumerate(some_requests())]
    alone = [ask(plain, ids, patches, max_new_tokens=25, sampling=sampling) for ids, patches, sampling in requests]
    sent = [send(engine, ids, patches, max_new_tokens=25, sampling=sampling)[0] for ids, patches, sampling in requests]
    assert [listener.result() for listener in sent] == alone
    settle(engine)


def test_a_step_begins_before_the_last_one_is_read(engine, monkeypatch):
    order = []
    launch, read = StaticDecoder.launch, cuda_graphs.Launched.read
    monkeypatch.setattr(StaticDecoder, "launch", lambda *given: order.append("launch") or launch(*given))
    monkeypatch.setattr(cuda_graphs.Launched, "read", lambda self: order.append("read") or read(self))
    ask(engine, ids_of(5), max_new_tokens=6)
    # the first token comes with the prompt, and the last step has no one after it
    assert order == ["launch", *["launch", "read"] * 4, "read"]


class Contrary(Listener):
    """Forces some tokens, puts others in the place of sampled ones, and rules some out."""

    def __init__(self, max_new_tokens: int):
        super().__init__(max_new_tokens, Sampling(1.2, 1, 0, 3))

    @property
    def text_only(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return len(self.tokens) in (3, 4, 9)

    def forced(self) -> int | None:
        return 17 if len(self.tokens) in (6, 7) else None

    def take(self, token: int) -> int | None:
        following = super().take(token)
        return 11 if following is not None and len(self.tokens) in (2, 12) else following


def test_what_an_output_processor_decides_holds_for_overlapped_steps(model):
    found = []
    for each in (Engine(model, 30, SMALL), with_buffers(model, text_tokens=30)):
        listeners = [Contrary(20), Listener(20), Contrary(13), Listener(9, SAMPLINGS[2])]
        for number, listener in enumerate(listeners):
            each.submit(ids_of(6 + 5 * number, number), [], listener.max_new_tokens, listener)
        found.append([listener.result() for listener in listeners])
        settle(each)
        each.close()
    assert found[0] == found[1]
    assert all(token < 30 for token in found[1][0][3:5])
    assert found[1][0][6:8] == [17, 17]


@pytest.mark.parametrize("fault", ["not finite", "cancelled", "late", "processor", "launch", "overlapped launch"])
def test_a_neighbour_that_fails_changes_nothing(plain, engine, monkeypatch, fault, caplog):
    requests = some_requests()[:3]
    alone = [ask(plain, ids, patches, max_new_tokens=25) for ids, patches in requests]
    launch = StaticDecoder.launch

    class Rude(Listener):
        def take(self, token: int) -> int | None:
            if len(self.tokens) == 3:
                raise ValueError("planted")
            return super().take(token)

    def faulty(self: StaticDecoder, sequences):
        early = sequences[0].token is None
        if fault == ("overlapped launch" if early else "launch"):
            raise torch.OutOfMemoryError("planted")
        if fault == "not finite":
            engine.cache.kv_cache[:, [each.pages[0] for each in sequences if each.number == number]] = float("nan")
        return launch(self, sequences)

    sampled = Sampling(1, 1, 0, 99)
    number = sampling.uniform(99, 4)
    bad = {"processor": Rude, "cancelled": Held}.get(fault, Listener)(30, *[sampled] * (fault == "not finite"))
    monkeypatch.setattr(StaticDecoder, "launch", faulty)
    handle = engine.submit(*with_image(image(4, 4, 77)), 30, bad, seconds=0.0 if fault == "late" else 3600)
    listeners = [send(engine, ids, patches, max_new_tokens=25)[0] for ids, patches in requests]
    if isinstance(bad, Held):
        assert bad.reached.wait(300)
        engine.cancel(handle)
        bad.let_go.set()
    assert [listener.result() for listener in listeners] == alone
    settle(engine)
    if fault == "cancelled":
        assert len(bad.tokens) == 4
    elif "launch" in fault:
        assert len(bad.result()) == 30
        assert "a decoding step" in caplog.text
    else:
        with pytest.raises(
            (RuntimeError, ValueError), match={"processor": "planted", "late": "E_OVER"}.get(fault, fault)
        ):
            bad.result()
    assert engine.healthy()


def test_entries_of_steps_that_did_not_count_reach_nobody(model, plain):
    """Few pages, so that each is used again at once; requests that end early leave a step under way."""
    engine = with_buffers(model, options=replace(SMALL, cache_bytes=PagedCache.page_bytes(
        model.config.text_config, 8, torch.float32) * 12))  # fmt: skip
    engine.cache.kv_cache.fill_(float("nan"))
    requests = [(ids_of(3 + n % 9, n), [], 3 + n % 7) for n in range(20)]
    sent = [send(engine, *request)[0] for request in requests]
    assert [listener.result() for listener in sent] == [ask(plain, *request) for request in requests]
    settle(engine)
    engine.close()


def test_new_requests_do_not_wait_for_those_that_run(engine):
    long, handle = send(engine, ids_of(5), max_new_tokens=engine.scheduler.pool.count * 4)
    while not long.tokens:
        time.sleep(0.001)
    assert len(ask(engine, ids_of(7), max_new_tokens=5)) == 5
    assert not long.over.is_set()
    engine.cancel(handle)
    settle(engine)


# Graphs, but for the device


class Recorder:
    """Keeps what a graph would: the work on tensors, and nothing that the host decided."""

    def __init__(self):
        self.captured = self.replayed = 0

    def __call__(self, action):
        action()
        self.captured += 1

        def replay() -> None:
            self.replayed += 1
            action()

        return replay


def test_each_bucket_is_captured_once_and_capturing_leaves_no_trace(model, plain):
    recorder = Recorder()
    engine = with_buffers(model, recorder)
    assert recorder.captured == 3  # of 1, 2 and 4 sequences
    requests = [(ids_of(4 + n, n), [], 12, SAMPLINGS[n % 4]) for n in range(4)]
    for _ in range(2):
        sent = [send(engine, *request)[0] for request in requests]
        assert [listener.result() for listener in sent] == [ask(plain, *request) for request in requests]
    assert recorder.captured <= 9
    assert recorder.replayed > 12
    settle(engine)
    engine.close()


def test_logits_for_the_host_are_in_a_buffer_that_memory_is_planned_for(engine):
    static, text = engine.static_decoder, engine.model.config.text_config
    assert static is not None
    engine.cache.kv_cache.zero_()
    inputs = [cuda_graphs.DecodeInput(3 + place, 0, [place], SAMPLINGS[0], 0.5, 1024) for place in range(2)]
    found = static.logits(inputs)
    assert found.shape == (2, text.vocab_size) and found.dtype == torch.float32
    assert found.untyped_storage().nbytes() == kv_cache.logits_bytes(text, SMALL.max_num_seqs)
    assert static.logits(inputs[:1]).data_ptr() == found.data_ptr()


def test_capturing_between_two_steps_leaves_the_tokens_that_the_second_takes(model):
    found = []
    for given in (None, "read"):
        engine = with_buffers(model, Recorder())
        static = engine.static_decoder
        assert static is not None
        engine.cache.kv_cache.zero_()
        inputs = [cuda_graphs.DecodeInput(3 + place, 0, [place], SAMPLINGS[0], 0.5, 1024) for place in range(2)]
        sampled, _ = static.launch(inputs).read()
        tokens = sampled if given else [None, None]
        later = [
            replace(each, token=token, position=1, sampling=SAMPLINGS[1])
            for each, token in zip(inputs, tokens, strict=True)
        ]
        found.append((sampled, static.launch(later).read()))
        engine.close()
    assert found[0] == found[1]


def test_without_a_capture_steps_are_called_and_one_line_says_so(model, plain, caplog):
    def fail(action):
        action()
        raise RuntimeError("planted")

    with caplog.at_level(logging.WARNING):
        engine = with_buffers(model, fail)
        assert ask(engine, ids_of(9), max_new_tokens=12) == ask(plain, ids_of(9), max_new_tokens=12)
    assert [record.getMessage() for record in caplog.records] == [
        f"no graphs of steps with {kind} sampling (RuntimeError): they are called" for kind in ("plain", "greedy")
    ]
    engine.close()


def test_buckets():
    assert cuda_graphs.buckets(1) == [1]
    assert cuda_graphs.buckets(5) == [1, 2, 4, 5]
    assert cuda_graphs.buckets(64) == [1, 2, 4, 8, 16, 24, 32, 48, 64]
    assert cuda_graphs.buckets(200) == [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 200]
