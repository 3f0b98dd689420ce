"""The engine against the plain loop of :mod:`kimi_vl.model.generation`, and requests against each other.

In float32 on a CPU a request gives the same tokens alone, in a batch, in chunks, after others with the same
beginning, and whatever happens to its neighbours.
"""

from __future__ import annotations

import copy
import ctypes
import itertools
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

import numpy as np
import pytest
import torch

from kimi_vl import kernels
from kimi_vl.engine.decoder import FusedDecoder
from kimi_vl.engine.engine import Engine, EngineOptions, EngineStats, Overloaded, Patches, RequestHandle
from kimi_vl.engine.image_cache import EmbeddingCache
from kimi_vl.engine.kv_cache import Chunk, PagedCache
from kimi_vl.engine.requests import spans
from kimi_vl.engine.sampling import Sampling
from kimi_vl.engine.scheduler import Request, ScheduledChunk
from kimi_vl.errors import UserError
from kimi_vl.model.generation import Prompt, greedy
from kimi_vl.model.kimi_vl import KimiVL
from kimi_vl.weights import loader
from tests.listener import Listener

CHECKPOINT = Path(__file__).parents[1] / "golden" / "golden_a" / "checkpoint"
PAD = 1045
SMALL = EngineOptions(page_size=8, max_num_seqs=4, max_num_batched_tokens=12, max_waiting=40, cache_bytes=1 << 20)


@pytest.fixture(scope="module")
def model() -> KimiVL:
    return loader.load(CHECKPOINT, dtype=torch.float32)


@pytest.fixture
def engine(model) -> Iterator[Engine]:
    engine = Engine(model, 1024, SMALL)
    yield engine
    engine.close()


class Held(Listener):
    """Waits, with the engine, in its fourth token until it is let go."""

    def __init__(self, max_new_tokens: int):
        super().__init__(max_new_tokens)
        self.reached, self.let_go = threading.Event(), threading.Event()

    def take(self, token: int) -> int | None:
        if len(self.tokens) == 3:
            self.reached.set()
            assert self.let_go.wait(300)
        return super().take(token)


def ids_of(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(1000), k=length)


def image(rows: int, columns: int, seed: int) -> Patches:
    pixels = np.random.default_rng(seed).uniform(-1, 1, (rows * columns, 3, 14, 14)).astype(np.float32)
    return Patches(pixels, (rows, columns))


def with_image(picture: Patches, seed: int = 0) -> tuple[list[int], list[Patches]]:
    return [*ids_of(3, seed), *[PAD] * picture.tokens, *ids_of(4, seed + 1)], [picture]


def send(
    engine: Engine,
    ids: Sequence[int],
    patches: Sequence[Patches] = (),
    max_new_tokens: int = 10,
    sampling=None,
    **options,
) -> tuple[Listener, RequestHandle]:
    listener = Listener(max_new_tokens, sampling)
    return listener, engine.submit(ids, patches, max_new_tokens, listener, **options)


def ask(engine: Engine, *request, **options) -> list[int]:
    return send(engine, *request, **options)[0].result()


def settle(engine: Engine) -> None:
    """Wait until nothing runs; then every page must be available again."""
    end = time.monotonic() + 300
    while engine.scheduler.busy and time.monotonic() < end:
        time.sleep(0.005)
    assert not engine.scheduler.busy
    assert engine.scheduler.pool.available == engine.scheduler.pool.count


def some_requests() -> list[tuple[list[int], list[Patches]]]:
    lengths = (1, 2, 7, 8, 9, 16, 23, 40)
    return [(ids_of(length, length), []) for length in lengths] + [
        with_image(image(4, 6, 3)),
        with_image(image(2, 8, 4), 5),
        with_image(image(4, 6, 5), 9),
    ]


def test_the_engine_gives_what_the_plain_loop_gives(model, engine):
    for ids, patches in some_requests():
        pixels = torch.from_numpy(patches[0].pixel_values) if patches else None
        plain = greedy(model, [Prompt(ids, pixels, [p.grid for p in patches])], frozenset(), 12)[0]
        assert ask(engine, ids, patches, max_new_tokens=12) == plain


def test_results_are_batch_invariant(model, engine):
    samplings = [Sampling(0, 1, 0, 0), Sampling(1, 1, 0, 5), Sampling(0.8, 0.9, 0, 6), Sampling(1.5, 1, 20, 7)]
    requests = [(ids, patches, samplings[n % 4]) for n, (ids, patches) in enumerate(some_requests())]
    alone = [ask(engine, ids, patches, sampling=sampling) for ids, patches, sampling in requests]
    fresh = Engine(model, 1024, SMALL)
    sent = [send(fresh, ids, patches, sampling=sampling)[0] for ids, patches, sampling in requests]
    assert [listener.result() for listener in sent] == alone
    assert len({tuple(tokens) for tokens in alone}) > 6
    settle(fresh)
    fresh.close()


@pytest.mark.parametrize("max_num_batched_tokens", [5, 7, 64])
@pytest.mark.parametrize("page_size", [1, 5, 64])
def test_chunks_and_pages_of_any_size_change_nothing(model, engine, max_num_batched_tokens, page_size):
    options = EngineOptions(
        page_size=page_size, max_num_seqs=4, max_num_batched_tokens=max_num_batched_tokens, cache_bytes=1 << 20
    )
    other = Engine(model, 1024, options)
    for ids, patches in some_requests():
        assert ask(other, ids, patches) == ask(engine, ids, patches)
    settle(other)
    other.close()


def test_what_was_computed_before_is_used_again_and_changes_nothing(model, engine):
    fresh = Engine(
        model, 1024, EngineOptions(page_size=8, max_num_batched_tokens=64, cache_bytes=1 << 20, prefix_caching=False)
    )
    ids, patches = with_image(image(6, 8, 1), 2)
    ids += ids_of(30, 3)
    for tail in ([], [5], ids_of(9, 8), ids_of(20, 9)):
        listener, handle = send(engine, ids + tail, patches)
        assert listener.result() == ask(fresh, ids + tail, patches)
        assert handle.request.num_cached_tokens == (len(ids) // 8 * 8 if tail else 0)
    fresh.close()


def test_pictures_of_equal_size_are_never_mistaken(engine, model):
    fresh = Engine(
        model, 1024, EngineOptions(page_size=8, max_num_batched_tokens=64, cache_bytes=1 << 20, prefix_caching=False)
    )
    answers = set()
    for seed in range(4):
        ids, patches = with_image(image(6, 8, seed))
        tokens = ask(engine, ids, patches)
        assert tokens == ask(fresh, ids, patches)
        answers.add(tuple(tokens))
    assert len(answers) == 4
    fresh.close()


def test_pictures_are_encoded_in_float32_where_a_cpu_does_not_multiply_bfloat16(model, monkeypatch):
    picture = image(4, 6, 0)
    ids = [PAD] * picture.tokens
    chunk = ScheduledChunk(Request(ids, 1, spans(ids, [picture], PAD)), 0, len(ids))
    expected = model.encode_images(torch.from_numpy(picture.pixel_values), [picture.grid])
    errors = []
    for has_it in (True, False):
        monkeypatch.setattr(kernels, "multiplies_bfloat16", lambda has_it=has_it: has_it)
        own = copy.deepcopy(model).to(torch.bfloat16)
        (found,) = EmbeddingCache(own, 0).features(chunk, [picture])
        assert found.dtype == own.dtype == torch.bfloat16
        errors.append(float((found.float() - expected).norm() / expected.norm()))
    assert errors[1] < errors[0] < 0.05


def test_a_picture_is_encoded_once(engine, monkeypatch):
    calls = []
    encode = engine.model.encode_images
    monkeypatch.setattr(engine.model, "encode_images", lambda *given: calls.append(1) or encode(*given))
    picture = image(6, 8, 1)
    for seed in range(3):  # other words before it: the tokens cannot be reused, the picture's vectors can
        ask(engine, *with_image(picture, seed))
    assert len(calls) == 1


@pytest.mark.parametrize("fault", ["raises", "memory", "not finite", "cancelled", "late", "processor"])
def test_a_neighbour_that_fails_changes_nothing(model, engine, monkeypatch, fault):
    requests = some_requests()[:4]
    alone = [ask(engine, ids, patches, max_new_tokens=25) for ids, patches in requests]
    settle(engine)
    bad_ids, bad_patches = with_image(image(4, 4, 77))
    forward, listeners = Engine._forward, []

    def faulty(self: Engine, chunks: Sequence[ScheduledChunk]) -> torch.Tensor:
        bad = [chunk for chunk in chunks if chunk.request.ids[: len(bad_ids)] == bad_ids]
        if bad and bad[0].end > len(bad_ids) + 3:
            if fault == "raises":
                raise RuntimeError("planted")
            if fault == "memory":
                raise torch.OutOfMemoryError("planted")
            if fault == "not finite":
                self.cache.kv_cache[:, bad[0].request.pages] = float("nan")
        return forward(self, chunks)

    class Rude(Listener):
        def take(self, token: int) -> int | None:
            if len(self.tokens) == 3:
                raise ValueError("planted")
            return super().take(token)

    monkeypatch.setattr(Engine, "_forward", faulty)
    bad = {"processor": Rude, "cancelled": Held}.get(fault, Listener)(30)  # the first, so that it has page 0
    handle = engine.submit(bad_ids, bad_patches, 30, bad, seconds=0.0 if fault == "late" else 3600)
    listeners = [send(engine, ids, patches, max_new_tokens=25)[0] for ids, patches in requests]
    if isinstance(bad, Held):
        assert bad.reached.wait(300)
        engine.cancel(handle)
        bad.let_go.set()
    assert [listener.result() for listener in listeners] == alone
    settle(engine)
    if fault == "cancelled":
        assert len(bad.tokens) == 4 and bad.error is None
    else:
        expected = {"memory": "E_OVERLOADED", "late": "E_OVERLOADED", "not finite": "not finite"}
        with pytest.raises((RuntimeError, ValueError), match=expected.get(fault, "planted")) as raised:
            bad.result()
        if isinstance(raised.value, Overloaded):
            assert raised.value.cause == {"memory": "memory", "late": "deadline"}[fault]
    assert engine.healthy()
    monkeypatch.undo()
    assert ask(engine, *requests[0], max_new_tokens=25) == alone[0]


def test_values_that_are_not_finite_do_not_outlive_their_request(model):
    """A page whose last user failed is given to others: nothing of it may reach them, even behind a mask."""
    engine = Engine(
        model, 1024, EngineOptions(page_size=8, max_num_seqs=2, max_num_batched_tokens=16, cache_bytes=1 << 16)
    )
    right = ask(engine, ids_of(9), max_new_tokens=6)
    settle(engine)
    engine.cache.kv_cache.fill_(float("nan"))
    engine.scheduler.pool = type(engine.scheduler.pool)(engine.scheduler.pool.count)
    together = [send(engine, ids_of(9), max_new_tokens=6)[0], send(engine, ids_of(30, 4), max_new_tokens=6)[0]]
    assert together[0].result() == right
    together[1].result()
    engine.close()


def test_more_than_the_queue_holds_is_refused_at_once(model):
    engine = Engine(
        model,
        1024,
        EngineOptions(page_size=8, max_num_seqs=1, max_num_batched_tokens=8, max_waiting=3, cache_bytes=1 << 18),
    )
    held = Held(10)
    with engine._lock:
        engine.submit(ids_of(5), [], 10, held)
        waiting = [send(engine, ids_of(5), max_new_tokens=3)[0] for _ in range(2)]
    assert held.reached.wait(300)
    assert len(engine.scheduler.waiting) == 2
    waiting.append(send(engine, ids_of(5), max_new_tokens=3)[0])  # the scheduler does not know of this one yet
    for _ in range(5):
        with pytest.raises(Overloaded, match="E_OVERLOADED") as refused:
            send(engine, ids_of(5), max_new_tokens=3)
        assert refused.value.cause == "queue"
    held.let_go.set()
    assert [len(listener.result()) for listener in waiting] == [3] * 3
    settle(engine)
    engine.close()


def test_stats_are_those_of_the_moment(model):
    """Read in the midst of a step, while others wait, and when all is over: each token of a prompt counts once."""
    engine = Engine(
        model, 1024, EngineOptions(page_size=8, max_num_seqs=2, max_num_batched_tokens=12, cache_bytes=1 << 18)
    )
    assert engine.stats() == EngineStats(0, 0, 0.0, 0, 0, 0, 0, 0.0, True)
    held = Held(10)
    with engine._lock:
        first = send(engine, ids_of(20, 1), max_new_tokens=40)[0]
        engine.submit(ids_of(9), [], 10, held)
        waiting = [send(engine, ids_of(20, seed), max_new_tokens=3)[0] for seed in (1, 2)]
    assert held.reached.wait(300)
    during, pages = engine.stats(), sum(len(request.pages) for request in engine.scheduler.running)
    assert (during.running, during.waiting, during.prompt_tokens_computed) == (2, 2, 29)
    assert during.cache_usage_ratio == pytest.approx(pages / engine.scheduler.pool.count)
    assert during.output_tokens == len(first.tokens) + len(held.tokens) + 1  # the one that is being taken
    assert during.mean_request_s == 0
    held.let_go.set()
    for listener in (first, held, *waiting):
        listener.result()
    settle(engine)
    after = engine.stats()
    assert (after.running, after.waiting, after.cache_usage_ratio, after.steps) == (0, 0, 0.0, engine.steps)
    assert (after.prompt_tokens_computed, after.prompt_tokens_cached) == (29 + 4 + 20, 16)
    assert after.output_tokens == 40 + 10 + 3 + 3
    assert after.mean_request_s > 0
    engine.close()
    assert not engine.stats().healthy


def test_what_can_never_fit_is_refused(engine):
    with pytest.raises(UserError, match="E_PROMPT_TOO_LONG"):
        send(engine, ids_of(5), max_new_tokens=engine.scheduler.pool.count * 8)


def test_placeholders_and_pictures_must_agree(engine):
    with pytest.raises(ValueError, match="placeholders"):
        engine.submit([1, PAD, PAD, 2], [image(4, 4, 0)], 3, Listener(3))


@pytest.mark.parametrize("step", [1, 2, 5])  # two in the prompt's chunks, one at its end
def test_a_cancelled_request_is_in_no_further_step(engine, monkeypatch, step):
    forward, handles = engine._forward, []

    def cancelling(chunks: Sequence[ScheduledChunk]) -> torch.Tensor:
        if engine.steps == step:
            engine.cancel(handles[0])
        return forward(chunks)

    monkeypatch.setattr(engine, "_forward", cancelling)
    with engine._lock:  # the engine takes it in only when its handle is known here
        handles.append(send(engine, ids_of(60))[1])
    settle(engine)
    while not handles[0].cancelled or engine.scheduler.busy:
        time.sleep(0.001)
    assert engine.steps == step


def test_when_the_thread_dies_every_caller_is_told(model, monkeypatch):
    engine = Engine(model, 1024, SMALL)

    def broken() -> list[ScheduledChunk]:
        raise KeyError("planted")

    first, _ = send(engine, ids_of(5), max_new_tokens=500)
    while not first.tokens:
        time.sleep(0.001)
    monkeypatch.setattr(engine.scheduler, "plan", broken)
    others = []
    for _ in range(3):
        try:
            others.append(send(engine, ids_of(5))[0])
        except RuntimeError:
            break
    for listener in [first, *others]:
        with pytest.raises(KeyError):
            listener.result()
    assert not engine.healthy()
    with pytest.raises(RuntimeError, match="stopped"):
        send(engine, ids_of(5))


def test_closing_lets_what_runs_finish(model):
    before = threading.active_count()
    engine = Engine(model, 1024, SMALL)
    sent = [send(engine, ids_of(5, seed), max_new_tokens=30)[0] for seed in range(8)]
    engine.close()
    assert all(len(listener.tokens) == 30 for listener in sent)
    assert threading.active_count() == before
    with pytest.raises(RuntimeError, match="stopped"):
        send(engine, ids_of(5))


class Stopped(BaseException):
    """What Cog raises in the thread of a cancelled prediction, at whatever it is doing."""


def stopped_after(calls: int, action: Callable[[], object]) -> bool:
    """Runs an action and stops it after so many calls of functions, which is when Python looks for such exceptions."""
    left = calls

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal left
        left -= event in ("call", "c_return")
        if left == 0:
            raise Stopped

    sys.setprofile(count)
    try:
        action()
    except Stopped:
        return True
    finally:
        sys.setprofile(None)
    return False


def test_a_caller_who_is_stopped_while_it_sends_leaves_nothing_running(engine):
    for calls in itertools.count(1):
        listener = Listener(10_000)
        handles = []
        stopped = stopped_after(calls, lambda held=handles, by=listener: held.append(engine.submit([1], [], 500, by)))
        for handle in handles:
            engine.cancel(handle)
        assert len(ask(engine, ids_of(4), max_new_tokens=3)) == 3
        settle(engine)
        assert len(listener.tokens) < 500
        if not stopped:
            break
    assert calls > 20


def test_after_a_caller_who_is_stopped_while_it_cancels_the_next_one_is_heard(engine):
    for calls in itertools.count(1):
        listener, handle = send(engine, ids_of(4), max_new_tokens=3)
        listener.result()
        settle(engine)
        stopped = stopped_after(calls, lambda held=handle: engine.cancel(held))
        time.sleep(0.05)  # the engine waits again
        assert len(ask(engine, ids_of(4), max_new_tokens=3)) == 3
        if not stopped:
            break
    assert calls > 2


def test_a_caller_who_is_stopped_while_it_waits_for_the_lock_leaves_it_free(engine):
    ended, begun = [], threading.Event()

    def caller() -> None:
        try:
            begun.set()
            send(engine, ids_of(5))
        except Stopped:
            ended.append("stopped")

    thread = threading.Thread(target=caller)
    with engine._lock:
        thread.start()
        assert begun.wait(300)
        time.sleep(0.1)  # the moment to reach the lock
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(Stopped))
    thread.join()
    assert ended == ["stopped"]
    assert len(ask(engine, ids_of(4), max_new_tokens=3)) == 3


def test_a_step_reads_the_context_in_use_and_not_the_capacity(model):
    text = model.config.text_config
    read = []
    for pages in (20, 2000):
        step = PagedCache(text, pages, 8, dtype=torch.float32).step([Chunk([3, 1], 9, 10), Chunk([2], 4, 5)])
        (block,) = step.decode.blocks
        assert block.mask is not None
        read.append((tuple(step.decode.page_table.shape), block.slots.tolist(), block.mask.sum(1).tolist()))
    first = [*range(24, 32), 8, 9]
    assert read == [((2, 2), [first, [*range(16, 21), *[16] * 5]], [10, 5])] * 2


@torch.inference_mode()
def test_sequences_of_different_lengths_read_no_page_but_their_own(model):
    cache = PagedCache(model.config.text_config, 6, 8, dtype=torch.float32)
    cache.kv_cache.fill_(float("nan"))
    cache.clear([3, 1, 5, 2])
    step = cache.step([Chunk([3, 1, 5], 17, 18), Chunk([2], 4, 5), Chunk([1, 2], 8, 12)])
    decoder = FusedDecoder(copy.deepcopy(model).language_model, kernels.TORCH)
    states = decoder.states(model.embed(torch.tensor(ids_of(6))), step)
    assert torch.isfinite(states).all()


def test_random_traffic_from_many_threads(model, engine):
    """Good, cancelled and refused requests at once: the good ones are as alone, and all memory comes back."""
    rng = random.Random(4)
    requests = some_requests()
    alone = [ask(engine, ids, patches, max_new_tokens=15) for ids, patches in requests]
    wrong: list[object] = []

    def caller(seed: int) -> None:
        own = random.Random(seed)
        for _ in range(12):
            which = own.randrange(len(requests))
            try:
                listener, handle = send(engine, *requests[which], max_new_tokens=15)
            except UserError:
                continue
            if own.random() < 0.4:
                time.sleep(own.random() * 0.02)
                engine.cancel(handle)
            elif listener.result() != alone[which]:
                wrong.append(which)

    threads = [threading.Thread(target=caller, args=(rng.random(),)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    settle(engine)
