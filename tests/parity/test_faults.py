"""What goes wrong in the engine's thread: whom it ends, and that everybody else is served as before.

Faults are put in at public seams, into ordinary steps and into those over static buffers.
"""

from __future__ import annotations

import asyncio
import copy
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from kimi_vl import kernels
from kimi_vl.device import cuda
from kimi_vl.engine import sampling
from kimi_vl.engine.cuda_graphs import Launched, StaticDecoder
from kimi_vl.engine.decoder import FusedDecoder
from kimi_vl.engine.engine import Engine, EngineOptions
from kimi_vl.engine.faults import IN_A_ROW
from kimi_vl.engine.image_cache import EmbeddingCache
from kimi_vl.engine.kv_cache import PagedCache
from kimi_vl.engine.requests import RequestHandle
from kimi_vl.engine.sampling import Sampling
from kimi_vl.engine.scheduler import Scheduler
from kimi_vl.errors import UserError
from kimi_vl.model.kimi_vl import KimiVL
from kimi_vl.weights import loader
from tests.parity.test_engine import CHECKPOINT, SMALL, Listener, ask, ids_of, image, send, settle, some_requests

MARK = 1001  # an id that no other prompt has
SEED = 4242
BAD = Sampling(1, 0.9, 0, SEED)
WAYS = ["plain", "static"]


@pytest.fixture(scope="module")
def model() -> KimiVL:
    return loader.load(CHECKPOINT, dtype=torch.float32)


def made(model: KimiVL, way: str, options: EngineOptions = SMALL) -> Engine:
    return Engine(copy.deepcopy(model), 1024, options, ops=kernels.REFERENCE if way == "static" else None)


@pytest.fixture
def engine(model, request) -> Iterator[Engine]:
    engine = made(model, request.param)
    yield engine
    if engine.healthy():
        settle(engine)
    engine.close()


both = pytest.mark.parametrize("engine", WAYS, indirect=True)


def bad_request() -> tuple[list[int], list[Any]]:
    picture = image(4, 4, 77)
    return [3, MARK, *[1045] * picture.tokens, 5], [picture]


def out_of_memory() -> Exception:
    return torch.OutOfMemoryError("planted")


class Trap:
    """Fails at a seam in whatever has to do with the bad request, as long as it is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: Callable[[], BaseException] = out_of_memory):
        self._patch, self._error = monkeypatch, error
        self.handle: RequestHandle | None = None
        self.sprung = 0
        self.set = True
        self.marked = False  # whether the step that is computed has the bad prompt in it

    def at(self, owner: Any, name: str, concerned: Callable[..., bool] = lambda *given, **named: True) -> None:
        original = getattr(owner, name)

        def trapped(*given: Any, **named: Any) -> Any:
            if self.set and concerned(*given, **named):
                self.sprung += 1
                raise self._error()
            return original(*given, **named)

        self._patch.setattr(owner, name, trapped)

    def watch(self) -> None:
        embed = KimiVL.embed

        def watched(model: KimiVL, ids: torch.Tensor, *features: Any) -> torch.Tensor:
            self.marked = bool((ids == MARK).any())
            return embed(model, ids, *features)

        self._patch.setattr(KimiVL, "embed", watched)

    def pages(self) -> Sequence[int]:
        return self.handle.request.pages if self.handle else ()


def set_trap(trap: Trap, phase: str) -> None:
    def seeds(*given: Any, **named: Any) -> bool:
        return any(getattr(each, "seed", None) == SEED for each in given[1])

    if phase == "vision":
        trap.at(KimiVL, "encode_images")
    elif phase == "image cache":
        trap.at(EmbeddingCache, "keep")
    elif phase == "embedding":
        trap.at(KimiVL, "embed", lambda model, ids, *features: bool((ids == MARK).any()))
    elif phase in ("prefill", "logits"):
        trap.watch()
        trap.at(FusedDecoder, {"prefill": "states", "logits": "logits"}[phase], lambda *given: trap.marked)
    elif phase == "sample":
        trap.at(sampling, "sample_batch", seeds)
    elif phase == "clear":
        trap.at(PagedCache, "clear", lambda cache, pages: bool({*pages} & {*trap.pages()}))
    elif phase == "page table":
        trap.at(PagedCache, "step", lambda cache, chunks: any(chunk.pages is trap.pages() for chunk in chunks))


def some_neighbours(engine: Engine, max_new_tokens: int = 12) -> list[Listener]:
    return [send(engine, ids, patches, max_new_tokens=max_new_tokens)[0] for ids, patches in some_requests()[:3]]


PHASES = ["vision", "image cache", "embedding", "prefill", "logits", "sample", "clear", "page table"]


@both
@pytest.mark.parametrize("phase", PHASES)
def test_too_little_memory_for_a_request_is_its_own_matter(engine, monkeypatch, phase):
    alone = [listener.result() for listener in some_neighbours(engine)]
    right = ask(engine, *bad_request(), sampling=BAD)
    settle(engine)
    engine._embeddings.drop(bad_request()[1][0].digest)
    engine.scheduler.pool = type(engine.scheduler.pool)(engine.scheduler.pool.count)  # nothing is known
    kept = engine._embeddings.nbytes
    trap = Trap(monkeypatch)
    set_trap(trap, phase)
    bad = Listener(10, BAD)
    with engine._lock:  # all of them in one step, and the trap knows its handle
        others = some_neighbours(engine)
        trap.handle = engine.submit(*bad_request(), 10, bad)
    with pytest.raises(UserError, match="E_OVERLOADED"):
        bad.result()
    assert [listener.result() for listener in others] == alone
    assert trap.sprung >= 2  # together with others, and alone
    settle(engine)
    assert engine.healthy()
    if phase in ("vision", "image cache"):
        assert engine._embeddings.nbytes == kept
    trap.set = False
    assert ask(engine, *bad_request(), sampling=BAD) == right


@pytest.mark.parametrize("engine", ["static"], indirect=True)
@pytest.mark.parametrize(
    ("phase", "every"),
    [(phase, every) for phase in ("launch", "overlapped launch", "read", "replay") for every in (1, 2, 3)]
    + [("clear", 3)],
)
def test_a_step_over_buffers_that_fails_is_computed_another_way(engine, monkeypatch, phase, every):
    """Some of the steps fail; what was set aside, cleared or begun for them harms nobody."""
    alone = [listener.result() for listener in some_neighbours(engine)]
    engine.cache.kv_cache.fill_(float("nan"))
    engine.scheduler.pool = type(engine.scheduler.pool)(engine.scheduler.pool.count)
    trap, calls = Trap(monkeypatch), 0

    def due(*given: Any) -> bool:
        nonlocal calls
        calls += phase != "overlapped launch" or given[1][0].token is None
        return calls % every == 0 and (phase != "overlapped launch" or given[1][0].token is None)

    seams = {"read": (Launched, "read"), "clear": (PagedCache, "clear"), "replay": (FusedDecoder, "logits")}
    owner, name = seams.get(phase, (StaticDecoder, "launch"))
    decoding = {"replay": lambda *given: sys._getframe(2).f_code.co_name == "_step" and due(*given)}
    trap.at(owner, name, decoding.get(phase, due))
    listeners = some_neighbours(engine)
    found = []
    for listener in listeners:
        try:
            found.append(listener.result())
        except UserError:
            assert phase in ("clear", "replay")
            found.append(None)
    assert trap.sprung
    assert all(tokens in (None, right) for tokens, right in zip(found, alone, strict=True))
    assert phase in ("clear", "replay") or found == alone
    settle(engine)
    trap.set = False
    assert [listener.result() for listener in some_neighbours(engine)] == alone


@both
@pytest.mark.parametrize("memory", [True, False])
def test_nothing_of_a_failed_step_is_alive_when_it_is_tried_again(engine, monkeypatch, memory):
    states, kept, seen, emptied = FusedDecoder.states, [], [], []

    def failing(self: FusedDecoder, embeddings: torch.Tensor, step: Any) -> torch.Tensor:
        if kept:
            seen.append((kept[0](), sys.exc_info()[1], len(emptied)))
            return states(self, embeddings, step)
        large = torch.zeros(1 << 16)
        kept.append(weakref.ref(large))
        try:
            raise ValueError("what led to it") from None
        except ValueError as cause:
            raise (out_of_memory() if memory else RuntimeError("planted")) from cause

    monkeypatch.setattr(FusedDecoder, "states", failing)
    monkeypatch.setattr(cuda, "give_back_unused_memory", emptied.append)
    with engine._lock:
        listeners = some_neighbours(engine)
    assert [len(listener.result()) for listener in listeners] == [12] * 3
    assert seen[0] == (None, None, int(memory))


class Faulty(Listener):
    """Raises, in its fourth token, from one of the calls that the engine makes."""

    def __init__(self, call: str, error: BaseException):
        self.call, self.raised = call, error
        super().__init__(30, Sampling(1, 1, 0, 3))

    def _due(self, call: str) -> None:
        if call == self.call and len(self.tokens) == 3:
            raise self.raised

    @property
    def text_only(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        self._due("text_only")
        return False

    def forced(self) -> int | None:
        self._due("forced")
        return None

    def take(self, token: int) -> int | None:
        self._due("take")
        following = super().take(token)
        return {"outside": 10**9, "below": -1}.get(self.call, following) if len(self.tokens) == 3 else following

    def fail(self, error: Exception) -> None:
        super().fail(error)
        if self.call == "fail":
            raise self.raised


@both
@pytest.mark.parametrize("call", ["text_only", "forced", "take", "outside", "below", "fail"])
@pytest.mark.parametrize("error", [ValueError("planted"), asyncio.CancelledError(), SystemExit(3)])
def test_an_output_processor_that_raises_ends_its_own_request(engine, call, error):
    alone = [listener.result() for listener in some_neighbours(engine)]
    bad = Faulty(call, error)
    with engine._lock:
        handle = engine.submit(ids_of(6, 5), [], 30, bad, seconds=3600)
        others = some_neighbours(engine)
    if call == "fail":
        handle.deadline = 0
    assert bad.over.wait(300)
    assert isinstance(bad.error, Exception)
    assert len(bad.tokens) <= 3 or call == "fail"
    assert [listener.result() for listener in others] == alone
    settle(engine)
    assert engine.healthy()


@both
def test_an_output_processor_gets_one_token_past_its_limit_at_most(engine):
    greedy = Listener(100)
    engine.submit(ids_of(5), [], 7, greedy)
    with pytest.raises(ValueError, match="after the last"):
        greedy.result()
    assert len(greedy.tokens) == 8
    assert engine.healthy()


def sampling_with(top_k: int) -> Sampling:
    made = Sampling(1.3, 0.95, 0, 8)
    object.__setattr__(made, "top_k", top_k)  # whatever the check of parameters lets through
    return made


@both
@pytest.mark.parametrize("top_k", [2**31, 2**63, 2**64, 10**40])
def test_any_top_k_is_as_good_as_all_ids(engine, top_k, caplog):
    wanted = ask(engine, ids_of(5), sampling=sampling_with(engine.model.config.text_config.vocab_size))
    assert ask(engine, ids_of(5), sampling=sampling_with(top_k)) == wanted
    assert "failed" not in caplog.text  # and no other way was needed


def test_any_top_k_is_as_good_as_all_ids_where_a_batch_is_sampled_on_a_device():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    sampled = [
        sampling.sample_batch_on_device(logits, [sampling_with(top_k)] * 3, [0.1, 0.5, 0.9], [50] * 3)
        for top_k in (50, 2**63, 10**40)
    ]
    assert sampled[0] == sampled[1] == sampled[2]


# What ends the engine


def accelerator_error(code: int | None = 700) -> Exception:
    error = torch.AcceleratorError("planted")
    error.error_code = code  # pyright: ignore[reportAttributeAccessIssue]
    return error


@both
@pytest.mark.parametrize("seam", ["states", "sample_batch", "read", "launch"])
def test_a_lost_device_ends_the_engine_and_everybody_is_told(engine, monkeypatch, seam):
    if seam in ("read", "launch") and engine.static_decoder is None:
        return
    running = some_neighbours(engine, max_new_tokens=500)
    while not all(listener.tokens for listener in running):
        time.sleep(0.001)
    trap = Trap(monkeypatch, accelerator_error)
    owners = {
        "states": FusedDecoder,
        "sample_batch": sampling,
        "read": Launched,
        "launch": StaticDecoder,
    }
    with engine._lock:
        trap.at(owners[seam], seam)
        later = send(engine, ids_of(9))[0]
    for listener in [*running, later]:
        with pytest.raises(RuntimeError, match="device is lost"):
            listener.result()
    assert not engine.healthy()
    with pytest.raises(RuntimeError, match="stopped"):
        send(engine, ids_of(5))


@both
@pytest.mark.parametrize("code", [1, 2, 9, 209, 701])
def test_a_launch_that_is_refused_fails_its_own_request(engine, monkeypatch, code):
    trap = Trap(monkeypatch, lambda: accelerator_error(code))
    set_trap(trap, "prefill")
    with engine._lock:
        others = some_neighbours(engine)
        bad = send(engine, *bad_request(), sampling=BAD)[0]
    with pytest.raises(UserError if code == cuda.OUT_OF_MEMORY else torch.AcceleratorError):
        bad.result()
    assert [len(listener.result()) for listener in others] == [12] * 3
    assert engine.healthy()


def one_by_one(engine: Engine, count: int, request: Callable[[], tuple[list[int], list[Any]]]) -> list[str]:
    """What becomes of requests that are sent one after another."""
    ends = []
    for _ in range(count):
        try:
            ask(engine, *request(), sampling=BAD)
            ends.append("tokens")
        except Exception as error:
            ends.append(f"{type(error).__name__} {error}")
    return ends


@both
@pytest.mark.parametrize("phase", ["prefill", "sample", "vision"])
def test_when_every_request_fails_the_health_is_false(engine, monkeypatch, phase):
    """As where a kernel needs more than the card has: no memory is missing, and nothing is wrong with the requests."""
    trap = Trap(monkeypatch, lambda: RuntimeError("a kernel that is refused"))
    owner, name = {
        "prefill": (FusedDecoder, "states"),
        "sample": (sampling, "sample_batch"),
        "vision": (KimiVL, "encode_images"),
    }[phase]
    trap.at(owner, name)
    ends = one_by_one(engine, IN_A_ROW + 3, bad_request)
    assert ends[:IN_A_ROW] == ["RuntimeError a kernel that is refused"] * IN_A_ROW
    assert not engine.healthy()
    assert (
        "known to be right" in ends[IN_A_ROW] or "has stopped" in ends[IN_A_ROW]
    )  # it may come while that is found out
    assert ends[-1] == "RuntimeError the engine has stopped"


@both
@pytest.mark.parametrize("kind", ["their own fault", "memory", "not finite", "memory everywhere"])
def test_requests_that_fail_by_themselves_leave_the_health_true(engine, monkeypatch, kind):
    right = ask(engine, ids_of(5))
    errors = {"their own fault": lambda: RuntimeError("planted"), "memory everywhere": out_of_memory}
    trap = Trap(monkeypatch, errors.get(kind, out_of_memory))
    if kind == "not finite":
        trap.watch()
        finite = sampling.finite
        monkeypatch.setattr(sampling, "finite", lambda logits: finite(logits) & (not trap.marked))
    elif kind == "memory everywhere":
        trap.at(FusedDecoder, "states")
    else:
        set_trap(trap, "prefill")
    ends = one_by_one(engine, 2 * IN_A_ROW + 1, bad_request)
    assert len({*ends}) == 1 and ends[0] != "tokens"
    assert engine.healthy()
    trap.set = trap.marked = False
    assert ask(engine, ids_of(5)) == right


@both
def test_the_check_itself_leaves_nothing(engine):
    before = engine._embeddings.nbytes
    wanted = ask(engine, ids_of(20))
    engine.check()
    assert engine._embeddings.nbytes == before
    assert engine.scheduler.pool.available == engine.scheduler.pool.count
    assert ask(engine, ids_of(20)) == wanted


def test_the_check_knows_values_that_are_not_finite(model):
    engine = made(model, "plain")
    engine.check()
    engine.model.language_model.lm_head.weight.data[:] = float("nan")
    with pytest.raises(RuntimeError, match="not finite"):
        engine.check()


def test_everybody_is_told_of_the_end_also_behind_one_who_cannot_be(model, monkeypatch):
    engine = made(model, "plain")
    rude = Faulty("fail", ValueError("planted"))
    with engine._lock:
        engine.submit(ids_of(6), [], 30, rude)
        others = some_neighbours(engine, max_new_tokens=30)
        monkeypatch.setattr(Scheduler, "plan", lambda self: {}["planted"])
    for listener in [rude, *others]:
        with pytest.raises(KeyError):
            listener.result()
    assert not engine.healthy()


def test_a_thread_that_dies_of_anything_turns_the_health_false(model, monkeypatch):
    engine = made(model, "plain")

    def leave(self: Scheduler) -> list[Any]:
        raise SystemExit(3)

    with engine._lock:
        listener = send(engine, ids_of(6))[0]
        monkeypatch.setattr(Scheduler, "plan", leave)
    with pytest.raises(RuntimeError, match="SystemExit"):
        listener.result()
    assert not engine.healthy()


def test_a_thread_that_the_system_refuses_is_started_with_the_next_request(model, monkeypatch):
    engine = made(model, "plain")
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="can't start"):
        patch.setattr(threading.Thread, "start", lambda self: exec('raise RuntimeError("can\'t start new thread")'))
        send(engine, ids_of(5))
    assert len(ask(engine, ids_of(5), max_new_tokens=4)) == 4
    settle(engine)
    engine.close()


@pytest.mark.parametrize("ids", [[], [-1, 3], [5, 10**6]])
def test_prompts_that_no_embedding_is_for_are_refused_at_once(model, ids):
    engine = made(model, "plain")
    with pytest.raises(ValueError, match="vocabulary"):
        engine.submit(ids, [], 5, Listener(5))


@pytest.mark.parametrize("every", [2, 3])
def test_a_page_that_could_not_be_cleared_is_cleared_before_it_is_used(model, monkeypatch, every):
    """However often clearing fails, nobody's pages hold what an earlier user of them has left."""
    engine = made(
        model, "static", EngineOptions(page_size=2, max_num_seqs=4, max_num_batched_tokens=12, cache_bytes=1 << 18)
    )
    alone = [listener.result() for listener in some_neighbours(engine)]
    settle(engine)
    engine.cache.kv_cache.fill_(float("nan"))
    engine.scheduler.pool = type(engine.scheduler.pool)(engine.scheduler.pool.count)
    clear, calls = PagedCache.clear, 0

    def failing(self: PagedCache, pages: Sequence[int]) -> None:
        nonlocal calls
        calls += 1
        if calls % every == 0:
            raise RuntimeError("planted")
        clear(self, pages)

    states, read = FusedDecoder.states, []

    def looking(self: FusedDecoder, embeddings: torch.Tensor, step: Any) -> torch.Tensor:
        sequences = zip(step.decode.page_table.tolist(), step.decode.seq_lens.tolist(), strict=True)
        pages = [page for table, length in sequences for page in table[: -(-length // step.decode.page_size)]]
        pages += [page for chunk in step.prefills for page in chunk.pages.tolist()]
        read.append(bool(step.kv_cache[:, pages].isnan().any()))
        return states(self, embeddings, step)

    monkeypatch.setattr(PagedCache, "clear", failing)
    monkeypatch.setattr(FusedDecoder, "states", looking)
    for listener, right in zip(some_neighbours(engine), alone, strict=True):
        try:
            assert listener.result() == right
        except RuntimeError as error:
            assert str(error) == "planted"
    assert calls > 5
    assert read and not any(read)
    settle(engine)
    engine.close()
