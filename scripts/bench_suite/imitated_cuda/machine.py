"""What the imitated machine has: devices with memory and streams; what it counts, and what it reports."""

from __future__ import annotations

import contextlib
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .timelines import Block, Mark, Timeline

_MOST_FINDINGS = 40  # a single mistake may have hundreds
_ROOT = f"{Path(__file__).parents[3]}/"
_FOREIGN = (str(Path(__file__).parent), f"{_ROOT}.venv")


@dataclass(frozen=True)
class Card:
    """What the project may ask about a GPU; memory in bytes, shared memory for each thread block."""

    name: str
    capability: tuple[int, int]
    memory: int
    shared_memory: int
    multiprocessors: int


H100 = Card("NVIDIA H100 80GB HBM3", (9, 0), 80 << 30, 232_448, 132)
A100 = Card("NVIDIA A100-SXM4-80GB", (8, 0), 80 << 30, 166_912, 108)
L40S = Card("NVIDIA L40S", (8, 9), 48 << 30, 101_376, 142)


@dataclass
class Counts:
    """What has happened since the machine was made; the difference of two is what happened between.

    ``launches`` are operations and kernels begun on a device (several kernels of one operation count once, and the
    replay of a graph is one); ``captured`` those that replays repeated. ``device_waits`` are the calls after which
    the host has waited for all that a stream had to do, ``event_waits`` those for an event that it did not know to be
    over. Copies are between host and device; ``bytes_read`` and ``bytes_written`` are what operations ask of device
    memory, kernels what their programs ask for, caches left out.
    """

    launches: int = 0
    captured: int = 0
    device_waits: int = 0
    event_waits: int = 0
    pageable_copies: int = 0
    pinned_copies: int = 0
    bytes_read: int = 0
    bytes_written: int = 0

    def __sub__(self, other: Counts) -> Counts:
        return Counts(**{each.name: getattr(self, each.name) - getattr(other, each.name) for each in fields(self)})

    def __add__(self, other: Counts) -> Counts:
        return Counts(**{each.name: getattr(self, each.name) + getattr(other, each.name) for each in fields(self)})


@dataclass(frozen=True)
class Finding:
    """Something that a real device would refuse, answer wrongly, or wait for where it may not.

    ``kind`` is one of "device", "capture", "race", "wait", "shared memory", "freed", "allocator", "kernel".
    """

    kind: str
    text: str
    where: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.text} [{self.where}]"


class Stream:
    """Stands for torch.cuda.Stream."""

    def __init__(self, device: Any = None, priority: int = 0, **_: Any):
        self.machine = current()
        self.device = torch.device("cuda", self.machine.index(device))
        self.timeline = Timeline(f"a stream of {self.device}")
        self.seen = -1  # the version of the host's knowledge that this stream begins its work with
        self.machine.devices[self.device.index].streams.add(self)

    def wait_stream(self, other: Stream) -> None:
        self.timeline.follow(other.timeline.known)

    def wait_event(self, event: Event) -> None:
        self.timeline.follow(event.known)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def query(self) -> bool:
        return self.machine.host.knows((self.timeline, self.timeline.count))

    def synchronize(self) -> None:
        self.machine.wait("a stream is waited for", [self])


class Event:
    """Stands for torch.cuda.Event."""

    def __init__(self, *_: Any, **__: Any):
        self.machine = current()
        self.known: dict[Timeline, int] = {}

    def record(self, stream: Stream | None = None) -> None:
        self.known = dict((stream or self.machine.stream()).timeline.known)

    def wait(self, stream: Stream | None = None) -> None:
        (stream or self.machine.stream()).wait_event(self)

    def query(self) -> bool:
        self.machine.forbid_in_capture("an event is asked for")
        return all(self.machine.host.knows(mark) for mark in self.known.items())

    def synchronize(self) -> None:
        if not self.query():
            self.machine.counts.event_waits += 1
            self.machine.note("wait", "an event is waited for", forbidden=False)
        self.machine.learn(self.known)

    def elapsed_time(self, other: Event) -> float:
        return 1.0


class Device:
    """One GPU: its streams, and how much of its memory is in use."""

    def __init__(self, index: int, card: Card):
        self.index, self.card = index, card
        self.streams: weakref.WeakSet[Stream] = weakref.WeakSet()
        self.used = self.peak = 0
        self.stuck = False  # a capture that was invalidated has left the allocator with the graph's pool


@dataclass
class _Own:
    """What each thread of the host has to itself."""

    device: int = 0
    streams: dict[int, Stream] = field(default_factory=dict)
    graph: Any = None  # that this thread captures
    refused: list[Callable[[int], bool]] = field(default_factory=list)
    no_waits: list[str] = field(default_factory=list)


class Machine:
    """A host with some GPUs. Use :func:`imitated_cuda.imitated` to put it in the place of torch's."""

    def __init__(self, devices: int = 2, card: Card = H100):
        self.lock = threading.RLock()
        self.devices = [Device(index, card) for index in range(devices)]
        self.host = Timeline("the host")
        self.counts = Counts()
        self.findings: list[Finding] = []
        self.log: list[tuple[str, str, str]] | None = None  # (kind, what, where), where somebody wants to know
        self.blocks: weakref.WeakValueDictionary[int, Block] = weakref.WeakValueDictionary()
        self.pinned: dict[int, tuple[Block, Any]] = {}  # by storage, which stays: an address means one thing
        self.shared_bytes: Callable[[dict[str, Any]], int] | None = None  # of a launch, where that is looked at
        self.computes = True  # whether kernels are run, or only looked at
        self.pools: dict[tuple[int, int], weakref.WeakSet[Any]] = {}  # graphs that share memory
        self._own = threading.local()
        # what arrives late: copies out of pinned memory at the next work of a device, those into it when waited for
        self._coming: deque[Callable[[], None]] = deque()
        self._going: list[tuple[Mark, Callable[[], None]]] = []
        self._freed: deque[tuple[int, int]] = deque()  # finalizers may run anywhere, so they take no lock
        self._defaults: dict[int, Stream] = {}

    # What may be asked

    @property
    def own(self) -> _Own:
        if not hasattr(self._own, "value"):
            self._own.value = _Own()
        return self._own.value

    def index(self, device: Any = None) -> int:
        """The number of a device as torch.cuda's functions take it."""
        if device is None:
            return self.own.device
        if isinstance(device, int):
            return device
        device = torch.device(device)
        index = self.own.device if device.index is None else device.index
        if not 0 <= index < len(self.devices):
            raise RuntimeError("CUDA error: invalid device ordinal")
        return index

    def stream(self, device: Any = None) -> Stream:
        """The current stream of a device in this thread."""
        index = self.index(device)
        return self.own.streams.get(index) or self.default_stream(index)

    def default_stream(self, device: Any = None) -> Stream:
        index = self.index(device)
        with self.lock:
            if index not in self._defaults:
                self._defaults[index] = Stream(index)
            return self._defaults[index]

    def used(self, device: int = 0) -> int:
        """Bytes in use on a device."""
        self._settle()
        return self.devices[device].used

    def check(self) -> None:
        """Raises AssertionError with all findings."""
        if self.findings:
            raise AssertionError("\n".join(map(str, self.findings)))

    # What scenarios ask for

    @contextlib.contextmanager
    def refused_memory(self, when: Callable[[int], bool] = lambda nbytes: True) -> Iterator[None]:
        """In this thread every allocation for which ``when`` (of its bytes) holds finds the device full."""
        self.own.refused.append(when)
        try:
            yield
        finally:
            self.own.refused.remove(when)

    @contextlib.contextmanager
    def no_waits(self, why: str) -> Iterator[None]:
        """In this thread the host may neither wait for a device nor copy from pageable memory."""
        self.own.no_waits.append(why)
        try:
            yield
        finally:
            self.own.no_waits.pop()

    @contextlib.contextmanager
    def logged(self) -> Iterator[list[tuple[str, str, str]]]:
        """All waits, copies and launches within, in order: (kind, what, the project's lines that asked for it)."""
        self.log, before = [], self.log
        try:
            yield self.log
        finally:
            self.log = before

    # What happens

    def report(self, kind: str, text: str) -> None:
        finding = Finding(kind, text, where())
        with self.lock:
            if finding not in self.findings and len(self.findings) < _MOST_FINDINGS:
                self.findings.append(finding)

    def note(self, kind: str, what: str, forbidden: bool = True) -> None:
        if self.log is not None:
            self.log.append((kind, what, where()))
        if forbidden and self.own.no_waits and self.own.graph is None:
            self.report("wait", f"{self.own.no_waits[-1]}: {what}")

    def forbid_in_capture(self, what: str) -> None:
        """Raises as CUDA does when a thread that captures asks for ``what``; its capture is lost."""
        graph = self.own.graph
        if graph is not None:
            graph.invalid = True
            self.report("capture", f"in a capture {what}")
            raise cuda_error(900, "operation not permitted when stream is capturing")

    def wait(self, what: str, streams: Iterable[Stream]) -> None:
        """synchronises the host with all that has been launched on ``streams``."""
        self.forbid_in_capture(what)
        self.counts.device_waits += 1
        self.note("wait", what)
        for stream in list(streams):
            self.learn(stream.timeline.known)

    def learn(self, known: Mapping[Timeline, int]) -> None:
        """The host knows that so much is over; what was on its way by then arrives."""
        with self.lock:
            self.arrive()
            self.host.follow(known)
            still = []
            for mark, action in self._going:
                if self.host.knows(mark):
                    action()
                else:
                    still.append((mark, action))
            self._going = still

    def arrive(self) -> None:
        """Copies to devices happen as late as they can: before a device's next work."""
        while self._coming:
            self._coming.popleft()()

    def later(self, mark: Mark | None, action: Callable[[], None]) -> None:
        """What arrives when the host has waited for ``mark``, or before a device's next work."""
        if mark is None:
            self._coming.append(action)
        else:
            self._going.append((mark, action))

    def begin(self, index: int, what: str, launches: int = 1) -> Mark:
        """One more piece of work for the current stream of a device."""
        stream = self.stream(index)
        if stream.seen != self.host.version:
            stream.timeline.follow(self.host.known)
            stream.seen = self.host.version
        if launches:
            self.counts.launches += launches
            self.note("launch", what, forbidden=False)
        self.arrive()
        return stream.timeline.step()

    def access(self, block: Block, mark: Mark, what: str, writes: bool, values: Tensor | None = None) -> None:
        """``what`` touches a block, or of it no more than ``values``."""
        racing = block.access(mark, (0, block.nbytes) if values is None else _extent(values), writes)
        if racing:
            place = "pinned memory" if block.device is None else "memory"
            self.report("race", f"{what} {'writes' if writes else 'reads'} {place} that is still {racing}")

    def block(self, values: Tensor) -> Block | None:
        """The memory of values that are on a device."""
        return self.blocks.get(values.untyped_storage()._cdata)

    def allocate(self, values: Tensor, index: int) -> Block:
        """Memory of device ``index`` for ``values``; raises torch.OutOfMemoryError."""
        self._settle()
        device, nbytes = self.devices[index], -(-values.untyped_storage().nbytes() // 512) * 512
        if device.used + nbytes > device.card.memory or any(when(nbytes) for when in self.own.refused):
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {nbytes} bytes.")
        block = Block(index, nbytes)
        device.used += nbytes
        device.peak = max(device.peak, device.used)
        weakref.finalize(block, self._freed.append, (index, nbytes)).atexit = False
        self.blocks[values.untyped_storage()._cdata] = block
        return block

    def pin(self, values: Tensor) -> Tensor:
        """``values`` become pinned memory."""
        self.forbid_in_capture("pinned memory is allocated")
        storage = values.untyped_storage()
        self.pinned[storage._cdata] = Block(None, storage.nbytes()), storage
        return values

    def host_access(self, values: Tensor, what: str, writes: bool) -> None:
        """The host touches ``values``, which may be in pinned memory."""
        found = self.pinned.get(values.untyped_storage()._cdata)
        if found:
            with self.lock:
                self.access(found[0], self.host.step(), f"the host ({what})", writes, values)

    def _settle(self) -> None:
        while self._freed:
            index, nbytes = self._freed.popleft()
            self.devices[index].used -= nbytes


def cuda_error(code: int, text: str) -> Exception:
    """What torch raises for an error of CUDA."""
    error = torch.AcceleratorError(f"CUDA error: {text}")
    error.error_code = code  # pyright: ignore[reportAttributeAccessIssue]
    return error


def _extent(values: Tensor) -> tuple[int, int]:
    """From the first byte of ``values`` in their memory to behind the last one."""
    size, pairs = values.element_size(), zip(values.shape, values.stride(), strict=True)
    begin = int(values.storage_offset()) * size
    last = sum((int(count) - 1) * int(stride) for count, stride in pairs)
    return begin, begin + (last + 1) * size if values.numel() else begin


def where() -> str:
    """The innermost lines of the project that are being run, those of the imitation left out."""
    found: list[str] = []
    frame = sys._getframe(1)
    while frame is not None and len(found) < 3:
        file = frame.f_code.co_filename
        if file.startswith(_ROOT) and not file.startswith(_FOREIGN):
            found.append(f"{file[len(_ROOT) :]}:{frame.f_lineno}")
        frame = frame.f_back
    return " < ".join(found) or "?"


_current: list[Machine] = []


def current() -> Machine:
    """The machine in the place of torch's."""
    if not _current:
        raise RuntimeError("no machine is imitated; enter imitated_cuda.imitated() first")
    return _current[-1]


def imitating() -> bool:
    return bool(_current)
