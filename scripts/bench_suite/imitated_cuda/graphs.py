"""Graphs: a capture computes nothing and records operations, a replay runs them over the same memory."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .machine import Stream, cuda_error, current
from .tensors import DeviceTensor, spoil
from .timelines import Block, Mark

_pools = itertools.count(1)


def new_pool() -> tuple[int, int]:
    """Stands for torch.cuda.graph_pool_handle."""
    return 0, next(_pools)


def end_allocations(device: int, pool: Any) -> None:
    """Stands for torch._C._cuda_endAllocateToPool: ends what an invalidated capture has left open."""
    if not current().devices[device].stuck:
        raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
    current().devices[device].stuck = False


@dataclass(frozen=True)
class _Action:
    name: str
    run: Callable[[], Any]
    reads: Sequence[weakref.ref[Block] | None]  # None: the capture's own memory
    writes: Sequence[weakref.ref[Block] | None] | None  # None: of those read, the ones that the run says
    traffic: tuple[int, int]


class Graph:
    """Stands for torch.cuda.CUDAGraph."""

    def __init__(self, keep_graph: bool = False):
        self.machine = current()
        self.invalid = False
        self._pool: Any = None
        self._stream: Stream | None = None
        self._actions: list[_Action] = []
        self._own: weakref.WeakSet[Block] = weakref.WeakSet()
        self._memory: list[tuple[weakref.ref[Block], Tensor]] = []  # that the capture took from the pool

    # While it is captured

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        machine = self.machine
        if machine.own.graph is not None:
            machine.forbid_in_capture("another capture begins")
        self._stream = machine.stream()
        if self._stream is machine.default_stream(self._stream.device):
            raise cuda_error(900, "operation not permitted on the legacy stream, which cannot be captured")
        if machine.devices[self._stream.device.index].stuck:
            machine.report("allocator", "a capture begins while the allocator is left in an earlier one")
        self._pool = chosen = pool or new_pool()
        machine.pools.setdefault(chosen, weakref.WeakSet()).add(self)
        machine.own.graph = self

    def capture_end(self) -> None:
        machine, stream = self.machine, self._stream
        assert stream is not None
        machine.own.graph = None
        if self.invalid:
            machine.devices[stream.device.index].stuck = True
            raise cuda_error(901, "operation failed due to a previous error during capture")

    def belongs(self, index: int, name: str) -> None:
        """Reports work of a device or a stream that is not captured."""
        assert self._stream is not None
        if self.machine.stream(index) is not self._stream:
            self.machine.report("capture", f"{name} runs on cuda:{index}, which {self._stream.device}'s capture misses")

    def adopt(self, block: Block, values: Tensor) -> None:
        """Takes note of memory that was allocated in the capture."""
        self._own.add(block)
        self._memory.append((weakref.ref(block), values))

    def spoil(self) -> None:
        """Fills what nobody holds of the graph's memory, as other graphs of its pool may have."""
        for block, values in self._memory:
            if block() is None:
                spoil(values)

    def add(
        self,
        name: str,
        run: Callable[[], Any],
        reads: Sequence[DeviceTensor],
        writes: Sequence[DeviceTensor],
        traffic: tuple[int, int],
    ) -> None:
        known = [self._known(each) for each in reads]
        self._actions.append(_Action(name, run, known, [self._known(each) for each in writes], traffic))

    def add_kernel(
        self, name: str, run: Callable[[], tuple[set[int], int, int]], values: Sequence[DeviceTensor]
    ) -> None:
        """Of kernels it is known only when they run what they write to."""
        self._actions.append(_Action(name, run, [self._known(each) for each in values], None, (0, 0)))

    def _known(self, value: DeviceTensor) -> weakref.ref[Block] | None:
        """The memory of a tensor, unless it is the capture's own."""
        return None if value.block in self._own else weakref.ref(value.block)

    # Afterwards

    def replay(self) -> None:
        machine, stream = self.machine, self._stream
        assert stream is not None
        machine.forbid_in_capture("a graph is replayed")
        with machine.lock, torch._C._DisableTorchDispatch(), torch.inference_mode():
            # a replay goes to the current stream of the device that it was captured on
            mark = machine.begin(stream.device.index, f"a graph of {len(self._actions)} operations")
            machine.counts.captured += len(self._actions)
            for graph in machine.pools[self.pool()]:
                graph.spoil()
            for action in self._actions:
                result = action.run()
                if action.writes is None:
                    written, read, wrote = result
                    reads = [each for place, each in enumerate(action.reads) if place not in written]
                    writes = [each for place, each in enumerate(action.reads) if place in written]
                else:
                    (read, wrote), reads, writes = action.traffic, action.reads, action.writes
                machine.counts.bytes_read += read
                machine.counts.bytes_written += wrote
                self._touch(action.name, reads, mark, writes=False)
                self._touch(action.name, writes, mark, writes=True)

    def _touch(self, name: str, blocks: Iterable[weakref.ref[Block] | None], mark: Mark, writes: bool) -> None:
        for reference in blocks:
            block = reference() if reference is not None else None
            if block is not None:
                self.machine.access(block, mark, f"a replayed {name}", writes)
            elif reference is not None:
                self.machine.report(
                    "freed", f"a replayed {name} {'writes' if writes else 'reads'} memory that was freed"
                )

    def pool(self) -> tuple[int, int]:
        return self._pool

    def reset(self) -> None:
        self._actions.clear()

    @property
    def names(self) -> list[str]:
        """What was captured, in order."""
        return [action.name for action in self._actions]


class Capture:
    """Stands for torch.cuda.graph, with the order of its steps: what fails between leaves what it leaves there."""

    default_capture_stream: Stream | None = None  # made once, on the device that is current then

    def __init__(self, cuda_graph: Graph, pool: Any = None, stream: Any = None, capture_error_mode: str = "global"):
        if stream is None:
            if Capture.default_capture_stream is None:
                Capture.default_capture_stream = Stream()
            stream = Capture.default_capture_stream
        self.graph, self._pool, self._mode = cuda_graph, pool, capture_error_mode
        self._stream = torch.cuda.stream(stream)

    def __enter__(self) -> None:
        torch.cuda.synchronize()
        gc.collect()
        self._stream.__enter__()
        self.graph.capture_begin(pool=self._pool, capture_error_mode=self._mode)

    def __exit__(self, *error: object) -> None:
        self.graph.capture_end()
        self._stream.__exit__(None, None, None)


class UseStream:
    """Stands for torch.cuda.stream: the stream is its device's current one, and the device is current."""

    def __init__(self, stream: Stream | None):
        self._stream, self._before = stream, None

    def __enter__(self) -> None:
        if self._stream is not None:
            own, index = current().own, self._stream.device.index
            self._before = own.device, own.streams.get(index)
            own.device, own.streams[index] = index, self._stream

    def __exit__(self, *error: object) -> None:
        if self._stream is not None and self._before is not None:
            own, (device, stream) = current().own, self._before
            own.device = device
            if stream is None:
                own.streams.pop(self._stream.device.index, None)
            else:
                own.streams[self._stream.device.index] = stream
