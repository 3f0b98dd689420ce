"""Triton kernels on the imitated devices: run by the interpreter, watched for what they touch."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.errors import OutOfResources

from bench_suite import triton_on_cpu

from .machine import Machine, current
from .tensors import DeviceTensor

assert triton_on_cpu.interpreter is interpreter
_SCRIPTS = Path(__file__).parents[2]


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
        if machine.shared_bytes is not None:
            _judge_shared(machine, index, _description(machine, index, executor, args, kwargs))
        graph = machine.own.graph
        mark = machine.begin(index, name, launches=graph is None)
        run = functools.partial(_run, executor, called, args, kwargs)
        if graph is not None:
            graph.belongs(index, name)
            graph.add_kernel(name, run, ours)
            return
        if not machine.computes:
            return
        written, read, wrote = run()
        machine.counts.bytes_read += read
        machine.counts.bytes_written += wrote
        for place, value in enumerate(ours):
            machine.access(value.block, mark, name, writes=place in written)


_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int32: "i32", torch.int64: "i64", torch.bool: "i1"}


def _description(machine: Machine, index: int, executor: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """A launch as :mod:`compiled` takes it."""
    values = dict(zip(executor.arg_names, args, strict=False)) | kwargs
    options = {name: values.pop(name) for name in ("num_warps", "num_stages") if name in values}
    constants = {name: values[name] for name in executor.constexprs}
    others = {name: value for name, value in values.items() if name not in constants}
    constants |= {name: None for name, value in others.items() if value is None}
    types = {}
    for name, value in others.items():
        if isinstance(value, Tensor):
            types[name] = f"*{_TYPES[value.dtype]}"
        elif value is not None:
            types[name] = "fp32" if isinstance(value, float) else "i32"
    major, minor = machine.devices[index].card.capability
    return {
        "module": executor.fn.__module__,
        "kernel": executor.fn.__name__,
        "types": types,
        "constants": constants,
        "aligned": [name for name in types if isinstance(others[name], Tensor) or others[name] % 16 == 0],
        "options": options,
        "capability": major * 10 + minor,
    }


def _judge_shared(machine: Machine, index: int, launch: dict[str, Any]) -> None:
    assert machine.shared_bytes is not None
    needed, most = machine.shared_bytes(launch), machine.devices[index].card.shared_memory
    if needed > most:
        machine.report(
            "shared memory", f"{launch['kernel']} needs {needed} bytes of shared memory; {most} is the limit"
        )
        raise OutOfResources(needed, most, "shared memory")


class Compiler:
    """Asks a process of its own, which starts with the first question, how much shared memory launches need."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._known: dict[str, int] = {}

    def __call__(self, launch: dict[str, Any]) -> int:
        line = json.dumps(launch, sort_keys=True)
        if line not in self._known:
            if self._process is None:
                environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
                environment["PYTHONPATH"] = os.pathsep.join(map(str, (_SCRIPTS, _SCRIPTS.parent)))
                self._process = subprocess.Popen(
                    [sys.executable, "-P", _SCRIPTS / "bench_suite" / "imitated_cuda" / "compiled.py"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    env=environment,
                )
            assert self._process.stdin is not None and self._process.stdout is not None
            print(line, file=self._process.stdin, flush=True)
            self._known[line] = int(self._process.stdout.readline())
        return self._known[line]

    def __enter__(self) -> Compiler:
        return self

    def __exit__(self, *error: object) -> None:
        if self._process is not None:
            self._process.communicate()


def _run(executor: Any, called: Callable[..., Any], args: Any, kwargs: Any) -> tuple[set[int], int, int]:
    """Which of its tensors a kernel wrote to, and the bytes that its programs read and wrote."""
    plain = [value.inner if isinstance(value, DeviceTensor) else value for value in args]
    named = {key: value.inner if isinstance(value, DeviceTensor) else value for key, value in kwargs.items()}
    with torch._C._DisableTorchDispatch(), torch.inference_mode():
        _watch.expect([value for value in (*plain, *named.values()) if isinstance(value, Tensor)])
        called(executor, *plain, **named)
    return set(_watch.written), _watch.read, _watch.wrote
