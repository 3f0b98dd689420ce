"""torch.cuda for the time that a machine is imitated; everything is put back afterwards."""

from __future__ import annotations

import contextlib
import ctypes
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from . import graphs, kernels, machine, tensors
from .machine import Card, Device, Event, Machine, Stream

_MISSING = object()


@contextlib.contextmanager
def imitated(devices: int = 2, card: Card = machine.H100) -> Iterator[Machine]:
    """A :class:`Machine` with so many devices of a kind in the place of torch's CUDA."""
    if machine.imitating():
        raise RuntimeError("a machine is imitated already")
    made = Machine(devices, card)
    with contextlib.ExitStack() as stack:
        stack.callback(machine._current.remove, made)
        machine._current.append(made)
        _let_indexing_ask_for_devices(stack)
        for owner, name, value in _replacements(made):
            _replace(stack, owner, name, value)
        graphs.Capture.default_capture_stream = None
        before = torch._C._only_lift_cpu_tensors()
        stack.callback(torch._C._set_only_lift_cpu_tensors, before)
        stack.enter_context(tensors.DeviceMode())
        yield made


def _replace(stack: contextlib.ExitStack, owner: Any, name: str, value: Any) -> None:
    before = vars(owner).get(name, _MISSING)
    setattr(owner, name, value)
    if before is _MISSING:
        stack.callback(delattr, owner, name)
    else:
        stack.callback(setattr, owner, name, before)


def _let_indexing_ask_for_devices(stack: contextlib.ExitStack) -> None:
    """torch's own code sets a device before it indexes: a build for CPUs has nothing registered that would answer for
    CUDA's, so what answers for devices without memory does."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    registry = (ctypes.c_void_p * 22).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    cuda, meta = 1, 14
    before = registry[cuda]
    if before is None:
        registry[cuda] = registry[meta]
        stack.callback(registry.__setitem__, cuda, None)


class _Generator(torch.Generator):
    """Random numbers of any device come from the CPU's generator."""

    def __new__(cls, device: Any = "cpu") -> _Generator:
        return super().__new__(cls, "cpu")  # pyright: ignore[reportCallIssue]


class _UseDevice:
    """Stands for torch.cuda.device."""

    def __init__(self, device: Any):
        self._device, self._before = machine.current().index(device), 0

    def __enter__(self) -> None:
        own = machine.current().own
        self._before, own.device = own.device, self._device

    def __exit__(self, *error: object) -> None:
        machine.current().own.device = self._before


def _replacements(made: Machine) -> list[tuple[Any, str, Any]]:
    cuda = torch.cuda

    def device(of: Any = None) -> Device:
        return made.devices[made.index(of)]

    def set_device(of: Any) -> None:
        made.own.device = made.index(of)

    def set_stream(stream: Stream) -> None:
        made.own.device, made.own.streams[stream.device.index] = stream.device.index, stream

    def synchronize(of: Any = None) -> None:
        made.wait("a device is waited for", device(of).streams)

    def properties(of: Any = None) -> Any:
        card = device(of).card
        return types.SimpleNamespace(
            name=card.name,
            major=card.capability[0],
            minor=card.capability[1],
            total_memory=card.memory,
            multi_processor_count=card.multiprocessors,
            shared_memory_per_block=48 << 10,
            shared_memory_per_block_optin=card.shared_memory,
            shared_memory_per_multiprocessor=card.shared_memory + 1024,
            warp_size=32,
        )

    def mem_get_info(of: Any = None) -> tuple[int, int]:
        index = made.index(of)
        total = made.devices[index].card.memory
        return total - made.used(index), total

    def reset_peak(of: Any = None) -> None:
        device(of).peak = made.used(made.index(of))

    def run(self: threading.Thread) -> None:
        if machine.imitating():
            with tensors.DeviceMode():
                thread_run(self)
        else:
            thread_run(self)

    def tensor(values: Any, *, device: Any = None, **rest: Any) -> torch.Tensor:
        if device is not None and torch.device(device) == torch.device("cuda"):
            device = torch.device("cuda", made.own.device)  # or torch would ask the guard for the current one
        return torch_tensor(values, device=device, **rest)

    thread_run, torch_tensor = threading.Thread.run, torch.tensor
    names = {
        "_lazy_init": lambda: None,
        "init": lambda: None,
        "is_initialized": lambda: True,
        "is_available": lambda: True,
        "device_count": lambda: len(made.devices),
        "current_device": lambda: made.own.device,
        "set_device": set_device,
        "device": _UseDevice,
        "Stream": Stream,
        "Event": Event,
        "stream": graphs.UseStream,
        "current_stream": made.stream,
        "default_stream": made.default_stream,
        "set_stream": set_stream,
        "synchronize": synchronize,
        "CUDAGraph": graphs.Graph,
        "graph": graphs.Capture,
        "graph_pool_handle": graphs.new_pool,
        "is_current_stream_capturing": lambda: made.own.graph is not None,
        "get_device_capability": lambda of=None: device(of).card.capability,
        "get_device_name": lambda of=None: device(of).card.name,
        "get_device_properties": properties,
        "mem_get_info": mem_get_info,
        "memory_allocated": lambda of=None: made.used(made.index(of)),
        "memory_reserved": lambda of=None: made.used(made.index(of)),
        "max_memory_allocated": lambda of=None: device(of).peak,
        "reset_peak_memory_stats": reset_peak,
        "empty_cache": lambda: None,
    }
    return [
        *((cuda, name, value) for name, value in names.items()),
        (torch._C, "_cuda_endAllocateToPool", graphs.end_allocations),
        (torch._C, "_cuda_releasePool", lambda of, pool: None),
        *((torch.Tensor, name, value) for name, value in tensors.replaced_reads().items()),
        *kernels.replaced(),
        (torch, "tensor", tensor),
        (torch, "Generator", _Generator),
        (threading.Thread, "run", run),
    ]
