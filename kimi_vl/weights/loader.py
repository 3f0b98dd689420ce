"""Loads safetensors files straight into the (fused) parameters on their device, and saves parameters to such a file.

Strict: every tensor the configuration calls for, of its shape, and none besides. Knows no network and no downloads.
"""

from __future__ import annotations

import io
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..device import cuda, memory
from ..errors import CheckpointError
from ..model.config import Config
from ..model.kimi_vl import KimiVL
from ..quantization import scheme as schemes
from ..quantization import search
from ..quantization.scheme import Quantization, Scheme
from ..quantization.weight import FLOAT8, QuantizedWeight
from . import compressed_tensors
from .shards import KINDS, Expected, Stored, opened, read_headers

log = logging.getLogger(__name__)

_ROUTER_BIAS = "e_score_correction_bias"
_PIECE = 2**24  # bytes of one read: small enough that threads end together, large enough to amortise the calls
_REPORT_S = 3.0


@dataclass(frozen=True)
class Slot:
    """Where a checkpoint tensor goes: a parameter's path and, for a fused one, the part of it."""

    parameter: str
    index: tuple[int | slice, ...]
    shape: tuple[int, ...]


def checkpoint_layout(config: Config) -> dict[str, Slot]:
    """Every tensor name of a checkpoint with ``config``, and its slot among the model's parameters."""
    return _layout(empty_model(config))


def _layout(model: KimiVL) -> dict[str, Slot]:
    return dict(pair for name, value in model.named_parameters() for pair in _slots(name, value))


def _slots(parameter: str, value: Tensor) -> Iterator[tuple[str, Slot]]:
    prefix, fused, kind = parameter.rpartition(".mlp.experts.")
    if not fused:
        yield parameter, Slot(parameter, (), tuple(value.shape))
        return
    experts, rows, columns = value.shape
    for expert in range(experts):
        name = f"{prefix}.mlp.experts.{expert}"
        if kind == "down_proj":
            yield f"{name}.down_proj.weight", Slot(parameter, (expert,), (rows, columns))
        else:
            half = rows // 2
            yield f"{name}.gate_proj.weight", Slot(parameter, (expert, slice(0, half)), (half, columns))
            yield f"{name}.up_proj.weight", Slot(parameter, (expert, slice(half, rows)), (half, columns))


def empty_model(config: Config, dtype: torch.dtype = torch.bfloat16) -> KimiVL:
    """The model without memory for its parameters (meta device); the router's correction biases stay float32."""
    with torch.device("meta"), _NoRandomFilling():
        model = KimiVL(config).to(dtype)
        for name, parameter in model.named_parameters():
            if name.endswith(_ROUTER_BIAS):
                parameter.data = parameter.data.float()
    return model


def planned_model(
    config: Config,
    dtype: torch.dtype = torch.bfloat16,
    form: str | None = None,
    device: torch.device | str = "cpu",
    directory: Path | None = None,
) -> KimiVL:
    """What :func:`load` makes of a checkpoint with ``config`` for ``device``, without memory.

    A quantised checkpoint's scales have the dtype that they have in ``directory``; None takes it for bfloat16, which
    it is where this package quantised the weights.
    """
    model = empty_model(config, dtype)
    plan = Plan(model, config.quantization, form, float8=cuda.has_float8(torch.device(device)))
    headers = read_headers(directory, plan.expected) if directory and config.quantization else {}
    plan.hold_quantized(model, _joined(headers))
    return model


class _NoRandomFilling(TorchFunctionMode):
    """Skips the random initialisation of parameters on the meta device, for which torch would import its compiler."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.nn.init.normal_, torch.nn.init.uniform_, torch.nn.init.kaiming_uniform_):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


@torch.inference_mode(False)  # the caller's mode does not hold in the threads that fill the parameters
def load(
    directory: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    threads: int = 0,
    form: str | None = None,
) -> KimiVL:
    """The model of ``directory`` in ``dtype`` on ``device``, ready for inference.

    ``form`` quantises the weights of a floating-point checkpoint while they are read, as one of
    :data:`kimi_vl.quantization.scheme.FORMS`. A quantised checkpoint stays as it is, but for weights that the decoder
    cannot compute with and for float8 on a device that does not have it: these become floating-point. Raises
    :class:`CheckpointError` naming each file, missing, unexpected or misshapen tensor. ``threads`` 0 takes
    :func:`default_threads`.
    """
    began = time.monotonic()
    directory, device = Path(directory), torch.device(device)
    config = Config.from_directory(directory)
    model = empty_model(config, dtype)
    plan = Plan(model, config.quantization, form, float8=cuda.has_float8(device))
    headers = read_headers(directory, plan.expected)
    plan.hold_quantized(model, _joined(headers))
    _give_memory(model, device)
    model.eval()
    total = sum(stored.nbytes for header in headers.values() for stored in header.values())
    with ExitStack() as stack:
        files = {file: stack.enter_context(opened(directory / file)) for file in headers}
        _fill(_work(model, plan, headers, files), total, device, threads or default_threads())
    seconds = time.monotonic() - began
    log.info("loaded %.2f GB in %.1f s (%.2f GB/s)", total / 1e9, seconds, total / 1e9 / seconds)
    return model


def _joined(headers: Mapping[str, Mapping[str, Stored]]) -> dict[str, Stored]:
    """Tensors of all files by their names."""
    return {name: stored for header in headers.values() for name, stored in header.items()}


def default_threads() -> int:
    """One for each core, at most eight: more are no faster at copying from the page cache."""
    return min(8, os.cpu_count() or 1)


def check(directory: str | Path) -> None:
    """Compare the checkpoint's headers with its configuration, reading no values; raises as :func:`load`."""
    directory = Path(directory)
    config = Config.from_directory(directory)
    read_headers(directory, Plan(empty_model(config), config.quantization, None).expected)


def save(model: KimiVL, path: str | Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write the weights to one safetensors file with the checkpoint's tensor names; router biases as float32."""
    parameters = dict(model.named_parameters())
    tensors = {}
    for name, slot in checkpoint_layout(model.config).items():
        kept = torch.float32 if name.endswith(_ROUTER_BIAS) else dtype
        tensors[name] = parameters[slot.parameter].detach()[slot.index].to("cpu", kept, copy=True).contiguous()
    save_file(tensors, str(path), metadata={"format": "pt"})


# Quantised weights


class Plan:
    """What the files hold of each weight, and what becomes of it.

    ``stored`` has the schemes of weights that are quantised in the files, ``held`` of those that are in the model,
    where no channels share a scale. Without ``float8`` the files' weights of that type are not held.
    Raises :class:`CheckpointError` where a scheme does not fit a weight.
    """

    def __init__(self, model: KimiVL, source: Quantization | None, form: str | None, *, float8: bool = False):
        self.slots = _layout(model)
        self._linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
        self.stored = self._schemes(source)
        if source is None:
            self.held = self._schemes(schemes.form(form)) if form else {}
        else:
            kept = (pair for pair in self.stored.items() if float8 or form or not pair[1].floating)
            self.held = {name: replace(scheme, rows=1) for name, scheme in kept if self._computed_with(name, scheme)}
            if form and self._schemes(schemes.form(form)) != self.stored:
                raise CheckpointError(f"the checkpoint is quantised already, and not as {form}; take the published one")
        for name, scheme in (self.stored | self.held).items():
            search.check_width(self.slots[name].shape[-1], scheme, name)
        self.expected: dict[str, Expected] = {}
        for name, slot in self.slots.items():
            if name in self.stored:
                self.expected |= compressed_tensors.stored_tensors(name, slot.shape, self.stored[name])
            else:
                self.expected[name] = Expected(slot.shape)

    def _schemes(self, given: Quantization | None) -> dict[str, Scheme]:
        """By the names of weights. A module counts as linear where it is in the published model."""
        if given is None:
            return {}
        found = {}
        for name, slot in self.slots.items():
            module, _, kind = name.rpartition(".")
            if kind == "weight" and len(slot.shape) == 2:
                scheme = given.scheme(module, linear=self._is_linear(module))
                found |= {name: scheme} if scheme else {}
        return found

    def _computed_with(self, name: str, scheme: Scheme) -> bool:
        """Whether the decoder computes with the weight as it is stored."""
        inputs, module = self.slots[name].shape[-1], name.removesuffix(".weight")
        if module.endswith("kv_b_proj"):  # which is read along its outputs too
            fits = scheme.bits == 8 and scheme.group in (0, inputs)
        else:
            fits = scheme.rows == 1 or inputs % (scheme.group or inputs) == 0
        return fits and module.startswith("language_model.") and self._is_linear(module)

    def _is_linear(self, module: str) -> bool:
        return module in self._linear or ".experts." in module

    def hold_quantized(self, model: KimiVL, stored: Mapping[str, Stored]) -> None:
        """Quantised weights without memory in the place of parameters of ``model``."""
        parameters: dict[str, set[Scheme | None]] = {}
        kinds: dict[str, torch.dtype] = {}  # of scales: the one that has the values of all
        for name, slot in self.slots.items():
            parameters.setdefault(slot.parameter, set()).add(self.held.get(name))
            if scales := stored.get(f"{name}_scale"):
                kind = KINDS[scales.kind]
                kinds[slot.parameter] = torch.promote_types(kind, kinds.get(slot.parameter, kind))
        for parameter, found in parameters.items():
            if len(found) > 1:
                raise CheckpointError(f"{parameter}: experts of a layer are quantised in different ways")
            (scheme,) = found
            if scheme is None:
                continue
            above, _, attribute = parameter.rpartition(".")
            module = model.get_submodule(above)
            shape = getattr(module, attribute).shape
            kind = FLOAT8 if scheme.floating else torch.uint8
            codes = torch.empty(*shape[:-1], shape[-1] * scheme.bits // 8, dtype=kind, device="meta")
            kind, groups = kinds.get(parameter, search.SCALES), shape[-1] // (scheme.group or shape[-1])
            scales = torch.empty(*shape[:-1], groups, dtype=kind, device="meta")
            delattr(module, attribute)
            setattr(module, attribute, QuantizedWeight(codes, scales, scheme.bits))


@dataclass(frozen=True)
class _Conversion:
    """A weight that is not in the files as it is to be in the model: its tensors there, and its place here."""

    name: str
    parts: Mapping[str, tuple[io.FileIO, Stored]]
    stored: Scheme | None
    held: Scheme | None
    target: Tensor | QuantizedWeight

    @property
    def nbytes(self) -> int:
        return sum(stored.nbytes for _, stored in self.parts.values())

    def run(self, device: torch.device) -> None:
        tensors = {name: read_tensor(*part).to(device) for name, part in self.parts.items()}
        shape = tuple(self.target.shape)
        if self.stored is not None:
            compressed_tensors.check_values(tensors, self.name, shape, self.stored)
        if isinstance(self.target, Tensor):
            assert self.stored is not None
            self.target.copy_(compressed_tensors.dequantized(tensors, self.name, self.stored))
            return
        assert self.held is not None
        if self.stored is None:
            codes, scales = search.quantize(tensors[self.name], self.held, self.name)
        else:
            codes, scales = compressed_tensors.codes_and_scales(tensors, self.name, shape, self.stored)
        self.target.codes.copy_(codes)
        self.target.scales.copy_(scales)


def read_tensor(file: io.FileIO, stored: Stored) -> Tensor:
    """A whole tensor, in this machine's memory."""
    values = torch.empty(stored.shape, dtype=KINDS[stored.kind])
    _Piece(file, stored.begin, values.dtype, values.view(-1)).read(values.view(-1))
    return values


# Values


@dataclass(frozen=True)
class _Piece:
    """Some of a tensor's bytes in a file, and the flat part of a parameter that they become."""

    file: io.FileIO
    offset: int
    kind: torch.dtype
    target: Tensor

    @property
    def nbytes(self) -> int:
        return self.target.numel() * self.kind.itemsize

    def read(self, buffer: Tensor) -> None:
        """Fill ``buffer``, flat and contiguous in this machine's memory, with the bytes."""
        view = buffer.view(torch.uint8).numpy().data
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self.file.fileno(), [view[done:]], self.offset + done)
            except OSError as error:
                raise CheckpointError(f"{self.file.name}: cannot be read ({error.strerror})") from None
            if not count:
                raise CheckpointError(f"{self.file.name}: was cut off while it was read")
            done += count


def _work(
    model: KimiVL, plan: Plan, headers: Mapping[str, Mapping[str, Stored]], files: Mapping[str, io.FileIO]
) -> Iterator[_Piece | _Conversion]:
    """All reads: first the tensors that are copied, in the order of the files, then those that are converted."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    parts = {name: (files[file], stored) for file, header in headers.items() for name, stored in header.items()}
    converted = plan.stored.keys() | plan.held.keys()
    for name, (file, stored) in sorted(parts.items(), key=lambda pair: (pair[1][0].name, pair[1][1].begin)):
        if name in converted or name not in plan.slots:
            continue
        slot, kind = plan.slots[name], KINDS[stored.kind]
        target = parameters[slot.parameter][slot.index].view(-1)
        count = _PIECE // kind.itemsize
        for first in range(0, target.numel(), count):
            part = target[first : first + count]
            yield _Piece(file, stored.begin + first * kind.itemsize, kind, part)
    for name in sorted(converted):
        slot, stored = plan.slots[name], plan.stored.get(name)
        names = [name] if stored is None else compressed_tensors.stored_tensors(name, slot.shape, stored)
        target = model.get_submodule(slot.parameter) if name in plan.held else parameters[slot.parameter]
        assert isinstance(target, QuantizedWeight | Tensor)
        yield _Conversion(name, {part: parts[part] for part in names}, stored, plan.held.get(name), target[slot.index])


def _fill(pieces: Iterator[_Piece | _Conversion], total: int, device: torch.device, threads: int) -> None:
    """Read all ``pieces``, ``total`` bytes, in ``threads`` threads. The first error stops all of them."""
    lock, stopped = threading.Lock(), threading.Event()
    moved, began = 0, time.monotonic()

    def work() -> None:
        nonlocal moved
        lane = _LANES.get(device.type, _Lane)(device)
        while not stopped.is_set():
            with lock:
                piece = next(pieces, None)
            if piece is None:
                break
            if isinstance(piece, _Conversion):
                piece.run(device)
            else:
                lane.move(piece)
            with lock:
                moved += piece.nbytes
        lane.finish()

    with ThreadPoolExecutor(threads) as pool:
        try:
            jobs = [pool.submit(work) for _ in range(threads)]
            while (state := wait(jobs, _REPORT_S, FIRST_EXCEPTION)).not_done:
                for job in state.done:
                    job.result()
                rate = moved / (time.monotonic() - began)
                log.info("loading: %.2f of %.2f GB, %.2f GB/s", moved / 1e9, total / 1e9, rate / 1e9)
            for job in jobs:
                job.result()
        finally:
            stopped.set()
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # conversions are computed there


class _Lane:
    """One thread that reads files into parameters, in place where possible and else through reusable buffers.

    The next buffer is filled while the last one is still being copied to the device.
    """

    buffers = 1

    def __init__(self, device: torch.device):
        self._ring: deque[tuple[Tensor, Callable[[], object]]] = deque()

    def move(self, piece: _Piece) -> None:
        target = piece.target
        if target.device.type == "cpu" and target.dtype == piece.kind:
            piece.read(target)
            return
        if len(self._ring) < self.buffers:
            buffer = self._buffer()
        else:
            buffer, arrived = self._ring.popleft()
            arrived()
        values = buffer[: piece.nbytes].view(piece.kind)
        piece.read(values)
        self._ring.append((buffer, self._send(values, target)))

    def finish(self) -> None:
        """Wait until all copies are complete."""
        for _, arrived in self._ring:
            arrived()

    def _buffer(self) -> Tensor:
        return torch.empty(_PIECE, dtype=torch.uint8)

    def _send(self, values: Tensor, target: Tensor) -> Callable[[], object]:
        """Start a copy; the result waits until ``values`` may be overwritten."""
        target.copy_(values)
        return lambda: None


class _CudaLane(_Lane):
    """Copies through pinned memory on a stream of its own, so that reads and copies of all threads overlap."""

    buffers = 2

    def __init__(self, device: torch.device):
        super().__init__(device)
        torch.cuda.synchronize(device)  # kernels that use this memory from before may still run
        self._stream = torch.cuda.Stream(device)

    def _buffer(self) -> Tensor:
        return torch.empty(_PIECE, dtype=torch.uint8, pin_memory=True)

    def _send(self, values: Tensor, target: Tensor) -> Callable[[], object]:
        with torch.cuda.stream(self._stream):
            if values.dtype != target.dtype:
                # converted on the device: copy_ would convert on the host, into memory that is not pinned
                values = values.to(target.device, non_blocking=True)
            target.copy_(values, non_blocking=True)
            event = torch.cuda.Event()
            event.record(self._stream)
        return event.synchronize


_LANES: dict[str, type[_Lane]] = {"cuda": _CudaLane}


def _give_memory(model: KimiVL, device: torch.device) -> None:
    """Replace parameters on the meta device by uninitialised ones on ``device``."""
    for module in model.modules():
        for name, value in list(module.named_parameters(recurse=False)):
            # not Module.to_empty: torch would import sympy for it, which takes half a second
            empty = memory.empty(value.shape, value.dtype, device)
            setattr(module, name, torch.nn.Parameter(empty, requires_grad=False))
