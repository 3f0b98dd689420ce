"""Triton kernels on the imitated devices: run by the interpreter, watched for what they touch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from triton.runtime import interpreter

from bench_suite import triton_on_cpu

from .machine import Machine, current
from .tensors import DeviceTensor

assert triton_on_cpu.interpreter is interpreter


class _Watch:
    """What the running kernel's programs have asked of memory: bytes, and which arguments they wrote to."""

    def __init__(self) -> None:
        self.read = self.wrote = 0
        self.extents: list[tuple[int, int, int]] = []  # of arguments: begin, end, place
        self.written: set[int] = set()

    def expect(self, arguments: list[Tensor]) -> None:
        self.read = self.wrote = 0
        self.written.clear()
        self.extents = []
        for place, value in enumerate(arguments):
            if value.numel():
                last = sum((count - 1) * stride for count, stride in zip(value.shape, value.stride(), strict=True))
                begin = value.data_ptr()
                self.extents.append((begin, begin + (last + 1) * value.element_size(), place))

    def note(self, pointers: Any, mask: Any, writes: bool) -> None:
        chosen = np.broadcast_to(mask.data.astype(bool), pointers.data.shape)
        count = int(np.count_nonzero(chosen))
        nbytes = count * max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        if not writes:
            self.read += nbytes
            return
        self.wrote += nbytes
        if count:
            address = int(pointers.data[chosen].flat[0])
            self.written |= {place for begin, end, place in self.extents if begin <= address < end}


_watch = _Watch()


def replaced() -> list[tuple[Any, str, Callable[..., Any]]]:
    """What of Triton's interpreter is other than it is while a machine is imitated: (owner, name, replacement)."""
    called = interpreter.GridExecutor.__call__
    load = interpreter.InterpreterBuilder.create_masked_load
    store = interpreter.InterpreterBuilder.create_masked_store

    def watched_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        _watch.note(pointers, mask, writes=False)
        return load(self, pointers, mask, *rest)

    def watched_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        _watch.note(pointers, mask, writes=True)
        return store(self, pointers, value, mask, *rest)

    def launched(self: Any, *args: Any, **kwargs: Any) -> Any:
        _launch(current(), self, called, args, kwargs)

    return [
        (interpreter.GridExecutor, "__call__", launched),
        (interpreter.InterpreterBuilder, "create_masked_load", watched_load),
        (interpreter.InterpreterBuilder, "create_masked_store", watched_store),
    ]


def _launch(machine: Machine, executor: Any, called: Callable[..., Any], args: Any, kwargs: Any) -> None:
    name, index = executor.fn.__name__, machine.own.device
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    ours = [value for value in tensors if isinstance(value, DeviceTensor)]
    if not ours:  # a kernel that is interpreted for the CPU
        called(executor, *args, **kwargs)
        return
    if len(ours) < len(tensors):
        machine.report("device", f"the kernel {name} gets a tensor of the host")
        raise ValueError(f"Pointer argument of {name} cannot be accessed from Triton (cpu tensor?)")
    for value in ours:
        if value.block.device != index:
            machine.report("device", f"the kernel {name} runs on cuda:{index} with tensors of {value.device}")
    with machine.lock:
        machine.judge_launch(index, executor.fn, args, kwargs)
        graph = machine.own.graph
        mark = machine.begin(index, name, launches=graph is None)
        run = functools.partial(_run, executor, called, args, kwargs)
        if graph is not None:
            graph.belongs(index, name)
            graph.add_kernel(name, run, ours)
            return
        written, read, wrote = run()
        machine.counts.bytes_read += read
        machine.counts.bytes_written += wrote
        for place, value in enumerate(ours):
            machine.access(value.block, mark, name, writes=place in written)


def _run(executor: Any, called: Callable[..., Any], args: Any, kwargs: Any) -> tuple[set[int], int, int]:
    """Which of its tensors a kernel wrote to, and the bytes that its programs read and wrote."""
    plain = [value.inner if isinstance(value, DeviceTensor) else value for value in args]
    named = {key: value.inner if isinstance(value, DeviceTensor) else value for key, value in kwargs.items()}
    with torch._C._DisableTorchDispatch(), torch.inference_mode():
        _watch.expect([value for value in (*plain, *named.values()) if isinstance(value, Tensor)])
        called(executor, *plain, **named)
    return set(_watch.written), _watch.read, _watch.wrote
