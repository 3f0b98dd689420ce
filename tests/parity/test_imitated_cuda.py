"""The engine on imitated GPUs: its tokens are those of the CPU, and a real GPU would have nothing against it."""

from __future__ import annotations

import contextlib
import gc
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from bench_suite import imitated_cuda
from bench_suite.imitated_cuda import Machine
from torch import Tensor
from triton.runtime.errors import OutOfResources

from kimi_vl.engine import sampling
from kimi_vl.engine.cuda_graphs import CudaGraphs, Launched, StaticDecoder
from kimi_vl.engine.decoder import FusedDecoder
from kimi_vl.engine.engine import Engine, RequestHandle
from kimi_vl.engine.kv_cache import PagedCache
from kimi_vl.engine.sampling import Sampling
from kimi_vl.engine.scheduler import ScheduledChunk
from kimi_vl.errors import UserError
from kimi_vl.kernels.inputs import Unset
from kimi_vl.kernels.triton import card as cards
from kimi_vl.kernels.triton import norm, prefill
from kimi_vl.model.kimi_vl import KimiVL
from tests.imitated_engine import (
    OPTIONS,
    PAD,
    Ask,
    Steps,
    answers,
    engine_of,
    load,
    picture,
    save_model,
    send,
    settle,
    some_asks,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_model(folder)
    return folder


@pytest.fixture(scope="module")
def wanted(folder) -> list[list[int]]:
    """What the CPU answers to some_asks."""
    with engine_of(load(folder)) as engine:
        return answers(engine, some_asks())


@pytest.fixture
def machine() -> Iterator[Machine]:
    with imitated_cuda.imitated() as machine:
        yield machine


# Tokens


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(("way", "device"), [("torch", "cuda:0"), ("captured", "cuda:0"), ("captured", "cuda:1")])
def test_tokens_are_those_of_the_cpu(folder, wanted, machine, monkeypatch, way, device, late):
    """With pictures, prompts in chunks, shared beginnings, tokens that are put in, and requests that come and go."""
    steps = Steps(machine, monkeypatch)
    with engine_of(load(folder, device), way) as engine:
        assert answers(engine, some_asks(), late) == wanted
        assert engine.healthy()
        assert engine.static_decoder is None or engine.static_decoder.captures
    machine.check()
    assert bool(steps.counts) == (way == "captured")
    assert machine.used(0 if device == "cuda:1" else 1) == 0


@pytest.mark.parametrize(("way", "device"), [("kernels", "cuda:0"), ("graphs", "cuda:1")])
def test_kernels_give_the_tokens_of_the_cpu(folder, wanted, machine, monkeypatch, way, device):
    steps = Steps(machine, monkeypatch)
    with engine_of(load(folder, device), way) as engine:
        assert answers(engine, some_asks(2)) == wanted[:2]
        assert engine.healthy()
    machine.check()
    assert bool(steps.counts) == (way == "graphs")


def test_pages_are_used_again(folder, machine):
    """Equal beginnings are taken from the cache; pages go from hand to hand where there are few."""
    asks = [Ask([*range(40, 40 + 8 * (1 + n % 3)), 7 + n % 5], 6, Sampling(1, 1, 0, n)) for n in range(8)]
    few = replace(OPTIONS, cache_bytes=OPTIONS.cache_bytes // 4)
    with engine_of(load(folder)) as engine:
        wanted = [send(engine, ask).result() for ask in asks]
    with engine_of(load(folder, "cuda:0"), "captured", few) as engine:
        assert answers(engine, asks) == wanted
        assert answers(engine, asks) == wanted
    machine.check()


def test_a_cancelled_request_leaves_its_neighbours_alone(folder, machine, monkeypatch):
    Steps(machine, monkeypatch)
    asks = some_asks(3)
    with engine_of(load(folder)) as engine:
        wanted = answers(engine, asks)
    with engine_of(load(folder, "cuda:0"), "captured") as engine:
        for after in (1, 3):
            processors = [send(engine, ask) for ask in asks]
            handles: list[RequestHandle] = []

            def cancel(count: int, after: int = after, handles: list[RequestHandle] = handles) -> None:
                if count == after:
                    engine.cancel(handles[0])

            bad = send(engine, Ask([9, 8, 7], 40), cancel, handles)
            assert [processor.result() for processor in processors] == wanted
            send(engine, asks[0]).result()
            assert after <= len(bad.tokens) < 40
    machine.check()


@pytest.mark.parametrize("captures", [False, True])
def test_a_capture_that_fails_half_way_costs_no_request(folder, wanted, machine, monkeypatch, captures):
    """The device is full in the midst of the step that is tried before a capture, or of the capture."""
    refusals = 0

    def when(nbytes: int) -> bool:
        nonlocal refusals
        refusals += graphing() == captures
        return refusals > 9

    capture = CudaGraphs.__call__

    def refused(graphs: CudaGraphs, action: Callable[[], None]) -> Callable[[], None]:
        with machine.refused_memory(when):
            return capture(graphs, action)

    with engine_of(load(folder, "cuda:0"), "captured") as engine:
        monkeypatch.setattr(CudaGraphs, "__call__", refused)
        assert answers(engine, some_asks(3)) == wanted[:3]
        assert engine.static_decoder is not None and not engine.static_decoder.captures
        assert engine.healthy()
    machine.check()


# Counts


@pytest.mark.parametrize("sequences", [1, 3])
def test_a_step_that_overlaps_is_one_launch(folder, machine, monkeypatch, sequences):
    """The graph; what a fresh page takes comes on top of it, and nothing waits."""
    steps = Steps(machine, monkeypatch)
    with engine_of(load(folder, "cuda:0"), "captured") as engine:
        answers(engine, [Ask([n + 1, 2, 3, 4, 5], 30, Sampling(1, 1, 0, n)) for n in range(sequences)])
    machine.check()
    assert len(steps.counts) > 20
    for counts in steps.counts:
        assert counts.device_waits == counts.event_waits == counts.pageable_copies == 0
    assert min(counts.launches for counts in steps.counts) == 1
    assert all(counts.captured > 20 and counts.bytes_read > counts.bytes_written > 0 for counts in steps.counts)


# Planted mistakes

Patch = pytest.MonkeyPatch


def around(patch: Patch, owner: Any, name: str, before: Callable[..., object]) -> None:
    """Calls ``before`` with the same arguments each time that a function of the project is called."""
    original = getattr(owner, name)

    def called(*given: Any, **named: Any) -> Any:
        before(*given, **named)
        return original(*given, **named)

    patch.setattr(owner, name, called)


def asks_the_device_in_a_capture(patch: Patch) -> None:
    around(patch, sampling, "finite", lambda logits: logits.sum().item())


def synchronizes_in_a_capture(patch: Patch) -> None:
    around(patch, FusedDecoder, "logits", lambda *_: torch.cuda.synchronize())


def copies_from_pageable_memory_in_a_capture(patch: Patch) -> None:
    around(patch, FusedDecoder, "states", lambda *_: torch.tensor([1.0], device="cuda"))


def pins_memory_in_a_capture(patch: Patch) -> None:
    around(patch, FusedDecoder, "states", lambda *_: torch.empty(1, pin_memory=True))


def draws_random_numbers_in_a_capture(patch: Patch) -> None:
    around(patch, FusedDecoder, "states", lambda *_: torch.rand(3, device="cuda"))


def does_not_recover_from_a_lost_capture(patch: Patch) -> None:
    """The first capture is invalidated; torch's allocator stays with it."""
    left = iter([True])
    around(patch, sampling, "finite", lambda logits: graphing() and next(left, False) and logits.sum().item())
    patch.setattr(CudaGraphs, "_recover", lambda *_: None)


def graphing() -> bool:
    return torch.cuda.is_current_stream_capturing()


def reads_results_before_their_event(patch: Patch) -> None:
    read = Launched.read
    patch.setattr(Launched, "read", lambda in_flight: read(replace(in_flight, event=None)))


def has_one_buffer_for_both_steps(patch: Patch) -> None:
    def share(decoder: StaticDecoder, sequences: object) -> None:
        decoder._host_inputs[1] = decoder._host_inputs[0]
        decoder._host_outputs[1] = decoder._host_outputs[0]

    around(patch, StaticDecoder, "launch", share)


def copies_results_to_pageable_memory(patch: Patch) -> None:
    def forget(decoder: StaticDecoder, sequences: object) -> None:
        decoder._host_outputs = [torch.zeros(each.shape, dtype=each.dtype) for each in decoder._host_outputs]

    around(patch, StaticDecoder, "launch", forget)


def indexes_with_the_host(patch: Patch) -> None:
    def clear(cache: PagedCache, pages: Sequence[int]) -> None:
        cache.kv_cache[:, torch.tensor([*pages])] = 0

    patch.setattr(PagedCache, "clear", clear)


def copies_from_pageable_memory_while_steps_overlap(patch: Patch) -> None:
    def clear(cache: PagedCache, pages: Sequence[int]) -> None:
        places = torch.tensor([*pages]).to(cache.kv_cache.device, non_blocking=True)
        cache.kv_cache.index_fill_(1, places, 0)

    patch.setattr(PagedCache, "clear", clear)


def waits_while_steps_overlap(patch: Patch) -> None:
    around(patch, PagedCache, "clear", lambda cache, pages: torch.cuda.current_stream().synchronize())


def replaces_a_buffer_under_its_graphs(patch: Patch) -> None:
    def replace_inputs(decoder: StaticDecoder, sequences: object) -> None:
        decoder._inputs = torch.empty_like(decoder._inputs).copy_(decoder._inputs)

    around(patch, StaticDecoder, "launch", replace_inputs)


def captures_without_waiting_for_the_warm_up(patch: Patch) -> None:
    patch.setattr(imitated_cuda.Stream, "wait_stream", lambda stream, other: None)


def puts_pictures_on_the_first_gpu(patch: Patch) -> None:
    encode = KimiVL.encode_images
    patch.setattr(KimiVL, "encode_images", lambda model, *given: encode(model, *given).to("cuda:0"))


def works_on_the_first_gpu(patch: Patch) -> None:
    """Nothing makes another one the current device."""
    patch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())


MISTAKES = [
    (asks_the_device_in_a_capture, "capture", "cuda:0"),
    (synchronizes_in_a_capture, "capture", "cuda:0"),
    (copies_from_pageable_memory_in_a_capture, "capture", "cuda:0"),
    (pins_memory_in_a_capture, "capture", "cuda:0"),
    (draws_random_numbers_in_a_capture, "capture", "cuda:0"),
    (does_not_recover_from_a_lost_capture, "allocator", "cuda:0"),
    (reads_results_before_their_event, "race", "cuda:0"),
    (has_one_buffer_for_both_steps, "race", "cuda:0"),
    (copies_results_to_pageable_memory, "race", "cuda:0"),
    (captures_without_waiting_for_the_warm_up, "race", "cuda:0"),
    (indexes_with_the_host, "device", "cuda:0"),
    (copies_from_pageable_memory_while_steps_overlap, "wait", "cuda:0"),
    (waits_while_steps_overlap, "wait", "cuda:0"),
    (replaces_a_buffer_under_its_graphs, "freed", "cuda:0"),
    (puts_pictures_on_the_first_gpu, "device", "cuda:1"),
    (works_on_the_first_gpu, "race", "cuda:1"),
]


@pytest.mark.parametrize(("mistake", "kind", "device"), MISTAKES)
def test_a_mistake_is_reported(folder, machine, monkeypatch, mistake, kind, device):
    """What the same requests meet without one is above: nothing."""
    Steps(machine, monkeypatch)
    mistake(monkeypatch)
    small = replace(OPTIONS, max_num_seqs=1)
    with contextlib.suppress(Exception), engine_of(load(folder, device), "captured", small) as engine:
        for ask in some_asks(2)[::-1]:
            with contextlib.suppress(Exception):
                send(engine, replace(ask, max_new_tokens=8)).result()
    assert kind in {finding.kind for finding in machine.findings}, machine.findings


class Launches:
    """A kernel that is launched with other options than the project gives it."""

    def __init__(self, kernel: Any, **options: Any):
        self._kernel, self._options = kernel, options

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *given, **named: self._kernel[grid](*given, **{**named, **self._options})


def test_a_kernel_that_needs_more_shared_memory_than_a_card_has_is_reported(monkeypatch):
    """The router at the published widths, as Triton compiles it for the card; nothing is computed."""
    with imitated_cuda.imitated(card=imitated_cuda.L40S) as machine, imitated_cuda.Compiler() as machine.shared_bytes:
        machine.computes = False

        def route() -> None:
            one, two, three = (torch.empty(norm.FEW + 1, 2048, dtype=torch.bfloat16, device="cuda") for _ in range(3))
            weight, bias = torch.empty(64, 2048, dtype=torch.bfloat16, device="cuda"), torch.empty(64, device="cuda")
            norm.norm_router(one, two, three[0], 1e-5, weight, bias, 6, 2.446)

        route()
        machine.check()
        monkeypatch.setattr(norm, "_norm_router", Launches(norm._norm_router, BLOCK_K=256))
        with pytest.raises(OutOfResources):
            route()
        assert [finding.kind for finding in machine.findings] == ["shared memory"]


@pytest.fixture
def other_cards():
    """What is known of a device is that of the machine that is imitated."""
    cards.shared_memory.cache_clear()
    yield
    cards.shared_memory.cache_clear()


@pytest.mark.usefixtures("other_cards")
@pytest.mark.parametrize("card", [imitated_cuda.L40S, imitated_cuda.H100], ids=lambda card: card.name)
def test_prompts_are_computed_by_a_plan_that_fits_the_card(card, monkeypatch):
    """At the published widths, as Triton compiles it; nothing is computed."""
    with imitated_cuda.imitated(card=card) as machine, imitated_cuda.Compiler() as machine.shared_bytes:
        machine.computes = False
        chunk = Unset(device="cuda").mla_prefill(40, 70)
        prefill.mla_prefill(*chunk.arguments)
        machine.check()
        assert machine.counts.device_waits == 0
        with contextlib.suppress(OutOfResources):
            prefill.mla_prefill(*chunk.arguments, plan=prefill.WIDE)
        refused = [] if card is imitated_cuda.H100 else ["shared memory"]
        assert [finding.kind for finding in machine.findings] == refused


# Memory

BAD = 99  # the first token of the request at fault
BAD_SEED = 77
OVERLOADED = "E_OVERLOADED"


class Full:
    """A device that is full whenever the request at fault needs memory in one phase of a step."""

    def __init__(self, machine: Machine, patch: Patch, phase: str):
        self.machine, self.patch = machine, patch
        self.refusals = 0
        self.pages: Sequence[int] = ()
        self.chunks: Sequence[ScheduledChunk] = ()  # of the forward pass under way
        self.used: list[int] = []  # bytes in use whenever one begins
        forward = Engine._forward

        def noted(engine: Engine, chunks: Sequence[ScheduledChunk]) -> Tensor:
            self.used.append(machine.used(0))
            self.chunks = chunks
            self.pages = next((chunk.request.pages for chunk in chunks if chunk.request.ids[0] == BAD), self.pages)
            try:
                return forward(engine, chunks)
            finally:
                self.chunks = ()

        patch.setattr(Engine, "_forward", noted)
        getattr(self, f"_{phase}")()

    def _at(self, owner: Any, name: str, concerned: Callable[..., bool]) -> None:
        original = getattr(owner, name)

        def refuse(nbytes: int) -> bool:
            self.refusals += 1
            return True

        def called(*given: Any, **named: Any) -> Any:
            if not concerned(*given, **named):
                return original(*given, **named)
            with self.machine.refused_memory(refuse):
                return original(*given, **named)

        self.patch.setattr(owner, name, called)

    def _takes_part(self, *_: Any, **__: Any) -> bool:
        return any(chunk.request.ids[0] == BAD for chunk in self.chunks)

    def _decodes(self, *_: Any) -> bool:
        return any(chunk.request.ids[0] == BAD and chunk.decodes for chunk in self.chunks)

    def _vision(self) -> None:
        self._at(KimiVL, "encode_images", lambda model, pixels, grids: (2, 6) in grids)

    def _embedding(self) -> None:
        self._at(KimiVL, "embed", self._takes_part)

    def _prefill(self) -> None:
        self._at(FusedDecoder, "states", self._takes_part)

    def _logits(self) -> None:
        self._at(FusedDecoder, "logits", self._takes_part)

    def _sample(self) -> None:
        self._at(sampling, "sample_batch", lambda _, samplings, *__, **___: any(s.seed == BAD_SEED for s in samplings))

    def _clear(self) -> None:
        self._at(PagedCache, "clear", lambda cache, pages: bool(pages) and self._takes_part())

    def _launch(self) -> None:
        """Neither as a step over buffers nor as any other."""
        self._at(
            StaticDecoder, "launch", lambda _, sequences: any(each.sampling.seed == BAD_SEED for each in sequences)
        )
        self._at(FusedDecoder, "states", self._decodes)

    def _overlapped(self) -> None:
        self._at(
            StaticDecoder,
            "launch",
            lambda _, sequences: any(each.token is None and each.sampling.seed == BAD_SEED for each in sequences),
        )


@pytest.mark.parametrize(
    "phase", ["vision", "embedding", "prefill", "logits", "sample", "clear", "launch", "overlapped"]
)
def test_the_request_that_does_not_fit_fails_alone(folder, wanted, machine, monkeypatch, phase):
    """Steps are called, not replayed, since those take memory. A step that only cannot begin early costs no request."""
    others = some_asks(3)
    pictures = [picture(2, 6, 3)] if phase == "vision" else []
    bad = Ask([BAD, *range(10, 22), *[PAD] * (3 * len(pictures))], 9, Sampling(1, 1, 0, BAD_SEED), pictures)
    with engine_of(load(folder)) as engine:
        right = send(engine, bad).result()
    with engine_of(load(folder, "cuda:0"), "called") as engine:
        assert answers(engine, others) == wanted[:3]
        settle(engine)
        before = machine.used(0)
        with monkeypatch.context() as patch:
            full = Full(machine, patch, phase)
            processor = send(engine, bad)
            assert answers(engine, others) == wanted[:3]
            if phase == "overlapped":
                assert processor.result() == right
            else:
                with pytest.raises(UserError, match=OVERLOADED):
                    processor.result()
            settle(engine)
        assert full.refusals
        gc.collect()
        assert {*full.used} == {before}  # also where a step is tried again
        assert machine.used(0) == before
        assert engine.healthy()
        assert send(engine, bad).result() == right
    machine.check()


# Anything at all


def extreme(random: Random) -> Ask:
    """A request whose every part may be at an end of what is allowed, or past it: building one may raise UserError."""
    sizes = random.choices([(2, 2), (2, 4), (4, 4), (2, 10)], k=random.choice([0, 0, 1, 2]))
    pictures = [picture(*size, seed) for seed, size in enumerate(sizes)]
    length = random.choice([1, 2, 7, 8, 9, 30])
    ids = [random.choice([0, 1, 139, 140, 148, 150, 383, random.randrange(140)]) for _ in range(length)]
    for each in pictures:
        ids += [*[PAD] * each.tokens, random.randrange(140)]
    wrong = random.random() < 0.1
    sampling = Sampling(
        random.choice([0, 5e-324, 1e-300, 1e-5, 1e-4, 0.6, 1, 2]),
        random.choice([0, 5e-324, 1e-300, 1e-9, 0.5, 0.95, 1 - 2**-53, 1]),
        2**63 if wrong else random.choice([0, 0, 1, 2, 383, 384, 385, 2**31 - 1]),
        random.choice([0, 1, 2**31, 2**63 - 1, random.randrange(2**63)]),
    )
    forced = {at: random.randrange(384) for at in range(8) if random.random() < 0.1}
    text_only = frozenset(at for at in range(8) if random.random() < 0.2)
    return Ask(ids, random.choice([1, 2, 5, 6, 7, 8, 9, 100_000]), sampling, pictures, forced, text_only)


class Fate:
    """What becomes of a request after so many tokens: nothing, or that it is cancelled, that the device is full for one
    of the next allocations, or that its output processor raises."""

    def __init__(self, machine: Machine, engine: Engine, random: Random):
        self._machine, self._engine = machine, engine
        self.kind = random.choice(["", "", "", "cancelled", "full", "raises"])
        self._at, self._passed = random.randrange(1, 4), random.randrange(30)
        self.handles: list[RequestHandle] = []

    def after(self, count: int) -> None:
        if count != self._at:
            return
        if self.kind == "cancelled":
            self._engine.cancel(self.handles[0])
        elif self.kind == "full":
            refuse_next(self._machine, self._passed)
        elif self.kind == "raises":
            raise ValueError("planted")


def fuzz(folder: Path, machine: Machine, way: str, count: int, seed: int) -> Counter[str]:
    """Sends ``count`` requests, a few at a time, each with a :class:`Fate`. Returns how many had which outcome."""
    random, outcomes = Random(seed), Counter[str]()
    known = some_asks(3)[2]
    with engine_of(load(folder)) as engine:
        right = send(engine, known).result()
    with engine_of(load(folder, "cuda:0"), way) as engine:
        for begin in range(0, count, 8):
            sent = []
            for _ in range(min(8, count - begin)):
                fate = Fate(machine, engine, random)
                try:
                    sent.append((send(engine, extreme(random), fate.after, fate.handles), fate.kind))
                except UserError as error:
                    outcomes[error.code] += 1
            settle(engine)
            for processor, fate in sent:
                outcome = "done" if processor.over.is_set() else fate
                outcome = (
                    outcome
                    if processor.error is None
                    else getattr(processor.error, "code", type(processor.error).__name__)
                )
                assert outcome in ("done", "cancelled", OVERLOADED, *(("ValueError",) if fate == "raises" else ()))
                outcomes[outcome] += 1
            assert engine.healthy()
        send(engine, known).over.wait(120)  # whatever is still to be refused
        assert send(engine, known).result() == right
    machine.check()
    return outcomes


def refuse_next(machine: Machine, passed: int) -> None:
    """Of this thread's next allocations one finds the device full, after so many have ``passed``."""
    refused = machine.own.refused

    def when(nbytes: int) -> bool:
        nonlocal passed
        passed -= 1
        if passed < 0:
            refused.remove(when)
        return passed < 0

    refused.append(when)


@pytest.mark.parametrize("way", ["torch", "captured"])
def test_whatever_is_asked_the_next_request_is_answered(folder, machine, way):
    """KIMI_VL_FUZZ sends so many requests, other ones in every run."""
    count = int(os.environ.get("KIMI_VL_FUZZ", "0"))
    seed = int.from_bytes(os.urandom(4)) if count else 1
    print("seed", seed)
    outcomes = fuzz(folder, machine, way, count or 24, seed)
    print(outcomes)
    assert sum(outcomes.values()) == (count or 24)
    assert {"done", "cancelled", "ValueError"} <= {*outcomes}
