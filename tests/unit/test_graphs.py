"""Captures that fail, on a stand-in for what torch 2.11 does to its allocator and its streams meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from kimi_vl.engine.cuda_graphs import CudaGraphs
from kimi_vl.engine.faults import Broken


class Torch211:
    """The parts of ``torch.cuda`` that a capture touches. Where CUDA has given a capture up, ending it raises before
    the allocator is told and before the stream is put back."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.at, self.device = "default", 0
        self.capturing: list[Any] = []  # pools
        self.uses: dict[Any, int] = {}
        self.given_up = self.mended = False
        self.lost = False
        self.streams = 0
        self.replayed: list[Any] = []
        cuda = torch.cuda
        for name in ("graph", "stream", "empty_cache", "synchronize", "graph_pool_handle"):
            monkeypatch.setattr(cuda, name, getattr(self, name))
        monkeypatch.setattr(cuda, "device", self.on)
        monkeypatch.setattr(cuda, "Stream", self.new_stream)
        monkeypatch.setattr(cuda, "current_stream", lambda device: Stream(self.at))
        monkeypatch.setattr(cuda, "CUDAGraph", lambda: Graph(self))
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self.end, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", self.release, raising=False)

    @contextlib.contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        before, self.device = self.device, device.index
        yield
        self.device = before

    def new_stream(self, device: torch.device) -> Stream:
        self.streams += 1
        return Stream(f"stream {self.streams} of {device}")

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.at = self.at, stream.name
        try:
            yield
        finally:
            self.at = before

    @contextlib.contextmanager
    def graph(self, graph: Graph, pool: Any, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local"
        self.empty_cache()
        before, self.at = self.at, stream.name
        if pool in self.capturing:
            raise RuntimeError("already recording to mempool_id")
        self.capturing.append(pool)
        self.uses[pool] = self.uses.get(pool, 0) + 1
        try:
            yield
        finally:
            if self.given_up:
                raise RuntimeError("operation failed due to a previous error during capture")
            self.capturing.remove(pool)
            self.at = before

    def graph_pool_handle(self) -> tuple[int, int]:
        return 0, len(self.uses) + 1

    def empty_cache(self) -> None:
        if self.capturing:
            raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")

    def synchronize(self, device: torch.device) -> None:
        if self.lost:
            raise RuntimeError("an illegal memory access was encountered")

    def end(self, device: int, pool: Any) -> None:
        assert device == 1
        if pool not in self.capturing:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.capturing.remove(pool)
        self.mended = True

    def release(self, device: int, pool: Any) -> None:
        assert device == 1
        self.uses[pool] -= 1


class Stream:
    def __init__(self, name: str):
        self.name = name

    def wait_stream(self, other: Stream) -> None: ...


class Graph:
    def __init__(self, world: Torch211):
        self._world = world

    def replay(self) -> None:
        self._world.replayed.append(self)


@pytest.fixture
def world(monkeypatch) -> Torch211:
    return Torch211(monkeypatch)


def test_captures_share_a_stream_and_memory_and_the_device_is_the_current_one(world):
    capture, seen = CudaGraphs(torch.device("cuda:1")), []
    replays = [capture(lambda: seen.append((world.at, world.device))) for _ in range(2)]
    assert seen == [("stream 1 of cuda:1", 1)] * 4  # once before each capture, once within
    assert (world.at, world.device) == ("default", 0)
    assert [*world.uses.values()] == [2]
    for replay in replays:
        replay()
    assert len({*world.replayed}) == 2


@pytest.mark.parametrize("before", [0, 2])
def test_a_capture_that_cuda_gives_up_leaves_the_device_usable_and_is_the_last(world, before):
    capture, calls = CudaGraphs(torch.device("cuda:1")), 0
    kept = [capture(lambda: None) for _ in range(before)]

    def torn() -> None:
        nonlocal calls
        calls += 1
        world.given_up = calls == 2  # in the capture, not in the call before it
        if world.given_up:
            raise torch.OutOfMemoryError("planted")

    with pytest.raises(RuntimeError):
        capture(torn)
    assert world.mended and not world.capturing
    assert world.at == "default"
    assert [*world.uses.values()] == [before]  # the memory of those that are replayed is still theirs
    world.empty_cache()
    world.given_up = False
    with pytest.raises(RuntimeError, match="nothing is captured"):
        capture(lambda: None)
    for replay in kept:
        replay()
    assert len(world.replayed) == before


def test_after_a_capture_that_ended_in_order_others_follow(world):
    capture, calls = CudaGraphs(torch.device("cuda:1")), 0

    def fails() -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise ValueError("planted")

    with pytest.raises(ValueError, match="planted"):
        capture(fails)
    assert not world.mended and world.at == "default"
    capture(lambda: None)()
    assert len(world.replayed) == 1


@pytest.mark.parametrize("why", ["device", "allocator"])
def test_where_nothing_helps_the_engine_ends(world, monkeypatch, why):
    def fails() -> None:
        if world.capturing:
            world.given_up, world.lost = True, why == "device"
            raise ValueError("planted")

    if why == "allocator":
        monkeypatch.delattr(torch._C, "_cuda_endAllocateToPool")
    with pytest.raises(Broken, match="KIMI_VL_GRAPHS=0"):
        CudaGraphs(torch.device("cuda:1"))(fails)
