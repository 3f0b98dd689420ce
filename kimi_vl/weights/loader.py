"""Disk to parameters: safetensors straight into the (fused) parameters on their device, and back to disk.

Strict: every tensor the configuration calls for, of its shape, and none besides. Knows no network and no downloads.
"""

from __future__ import annotations

import io
import json
import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..device import memory
from ..errors import CheckpointError
from ..model.config import Config
from ..model.kimi_vl import KimiVL

log = logging.getLogger(__name__)

_FLOATING = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_ROUTER_BIAS = "e_score_correction_bias"
_LONGEST_HEADER = 100_000_000  # bytes; safetensors itself takes no longer ones
_MOST_DIMENSIONS = 8
_PIECE = 2**24  # bytes read at a time: small enough that threads end together, large enough that calls cost nothing
_REPORT_S = 3.0


@dataclass(frozen=True)
class Slot:
    """Where a checkpoint tensor lives: a parameter's path and, for fused ones, the part of it."""

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


class _NoRandomFilling(TorchFunctionMode):
    """Leaves out the random start of parameters that have no memory; torch would import its compiler for it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.nn.init.normal_, torch.nn.init.uniform_, torch.nn.init.kaiming_uniform_):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


@torch.inference_mode(False)  # a caller's mode would not reach the threads that fill what it made
def load(
    directory: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    threads: int = 0,
) -> KimiVL:
    """The model of ``directory`` in ``dtype`` on ``device``, ready for inference.

    Raises :class:`CheckpointError` naming each file, missing, unexpected or misshapen tensor. ``threads`` 0 takes
    :func:`default_threads`.
    """
    began = time.monotonic()
    directory, device = Path(directory), torch.device(device)
    model = empty_model(Config.from_directory(directory), dtype)
    slots = _layout(model)
    headers = _headers(directory, slots)
    _give_memory(model, device)
    model.eval()
    total = sum(stored.end - stored.begin for header in headers.values() for stored in header.values())
    with ExitStack() as stack:
        files = {file: stack.enter_context(_opened(directory / file)) for file in headers}
        pieces = _pieces(model, slots, headers, files)
        _fill(pieces, total, device, threads or default_threads())
    seconds = time.monotonic() - began
    log.info("loaded %.2f GB in %.1f s (%.2f GB/s)", total / 1e9, seconds, total / 1e9 / seconds)
    return model


def default_threads() -> int:
    """One a core, eight at most: more gain nothing where reading is copying from the page cache."""
    return min(8, os.cpu_count() or 1)


def check(directory: str | Path) -> None:
    """Compare the checkpoint's headers with its configuration, reading no values; raises as :func:`load`."""
    directory = Path(directory)
    _headers(directory, checkpoint_layout(Config.from_directory(directory)))


def save(model: KimiVL, path: str | Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write the weights to one safetensors file with the checkpoint's tensor names; router biases as float32."""
    parameters = dict(model.named_parameters())
    tensors = {}
    for name, slot in checkpoint_layout(model.config).items():
        kept = torch.float32 if name.endswith(_ROUTER_BIAS) else dtype
        tensors[name] = parameters[slot.parameter].detach()[slot.index].to("cpu", kept, copy=True).contiguous()
    save_file(tensors, str(path), metadata={"format": "pt"})


# ---------------------------------------------------------------------------------------------
# Headers


@dataclass(frozen=True)
class _Stored:
    """A tensor as a file has it: its type by safetensors' name, and where its bytes are, from the file's start."""

    kind: str
    shape: tuple[int, ...]
    begin: int
    end: int


def _headers(directory: Path, slots: Mapping[str, Slot]) -> dict[str, dict[str, _Stored]]:
    """By file and tensor, what each file holds; :class:`CheckpointError` unless that is just what ``slots`` has."""
    promised = _shards(directory)
    headers: dict[str, dict[str, _Stored]] = {}
    problems: list[str] = []
    for file in sorted(promised):
        path = directory / file
        if not path.exists():
            raise CheckpointError(f"{path}: is missing")
        held = headers[file] = _header(path)
        expected = promised[file] & slots.keys()
        problems += [f"{path}: tensor {name} is not in it" for name in sorted(promised[file] - held.keys())]
        problems += [f"{path}: unexpected tensor {name}" for name in sorted(held.keys() - expected)]
        for name in sorted(held.keys() & expected):
            problems += [f"{path}: tensor {name} {problem}" for problem in _misfits(held[name], slots[name])]
    found = {name for held in headers.values() for name in held}
    problems += [f"{directory}: missing tensor {name}" for name in sorted(slots.keys() - found)]
    if problems:
        more = f" (and {len(problems) - 5} more problems)" if len(problems) > 5 else ""
        raise CheckpointError("; ".join(problems[:5]) + more)
    return headers


def _misfits(stored: _Stored, slot: Slot) -> Iterator[str]:
    if stored.shape != slot.shape:
        yield f"has shape {stored.shape}; {slot.shape} was expected"
    if stored.kind not in _FLOATING:
        yield f"has dtype {stored.kind}; a floating-point one was expected"


def _shards(directory: Path) -> dict[str, set[str]]:
    """File names with the tensors that the index (or the only file itself) says they hold."""
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        single = "model.safetensors"
        if not (directory / single).exists():
            raise CheckpointError(f"{directory}: holds neither {index.name} nor {single}")
        return {single: set(_header(directory / single))}
    shards: dict[str, set[str]] = {}
    for name, file in _weight_map(index).items():
        shards.setdefault(file, set()).add(name)
    return shards


def _weight_map(index: Path) -> Mapping[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(f"{index}: has no readable weight_map") from None
    if not isinstance(weight_map, Mapping):
        raise CheckpointError(f"{index}: weight_map is not an object")
    for name, file in weight_map.items():
        if not isinstance(file, str) or file != Path(file).name:
            raise CheckpointError(f"{index}: the file of tensor {name} is not a plain file name")
    return weight_map


def _opened(path: Path) -> io.FileIO:
    try:
        return path.open("rb", buffering=0)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None


def _header(path: Path) -> dict[str, _Stored]:
    """The tensors of a safetensors file, which must follow one another without gap or overlap to its very end."""
    with _opened(path) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if length > min(size - 8, _LONGEST_HEADER):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            return _parsed(file.read(length), 8 + length, size)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: is not a complete safetensors file ({error})") from None


def _parsed(text: bytes, begin: int, size: int) -> dict[str, _Stored]:
    """The header ``text`` of a file of ``size`` bytes whose tensors begin at ``begin``; ValueError says what is off."""
    if not text.startswith(b"{"):
        raise ValueError("the header is not an object")
    entries = json.loads(text.decode(), object_pairs_hook=_without_duplicates)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__ is not an object of texts")
    "".join(entries).encode()  # an escaped half of a surrogate pair could not even be written in a message
    tensors = {name: _stored(name, entry, begin) for name, entry in entries.items()}
    for name, stored in sorted(tensors.items(), key=lambda pair: (pair[1].begin, pair[1].end)):
        if stored.begin != begin:
            raise ValueError(f"tensor {name} begins at byte {stored.begin}, where {begin} was expected")
        begin = stored.end
    if begin != size:
        raise ValueError(f"its tensors end at byte {begin}, the file at {size}")
    return tensors


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("the header has a name twice")
    return entries


def _stored(name: str, entry: Any, start: int) -> _Stored:
    try:
        kind, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        # type() and not isinstance(): true and false are integers to Python
        good = type(kind) is str and type(shape) is list and len(shape) <= _MOST_DIMENSIONS
        if not (good and all(type(n) is int and n >= 0 for n in (*shape, begin, end)) and begin <= end):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"the entry of tensor {name} is not one") from None
    # other types are refused as such
    if kind in _FLOATING and math.prod(shape) * _FLOATING[kind].itemsize != end - begin:
        raise ValueError(f"tensor {name} has {end - begin} bytes, which is not {kind} of shape {tuple(shape)}")
    return _Stored(kind, tuple(shape), start + begin, start + end)


# ---------------------------------------------------------------------------------------------
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


def _pieces(
    model: KimiVL,
    slots: Mapping[str, Slot],
    headers: Mapping[str, Mapping[str, _Stored]],
    files: Mapping[str, io.FileIO],
) -> Iterator[_Piece]:
    """All that has to be read, in the order in which the files have it."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for file, header in headers.items():
        for name, stored in sorted(header.items(), key=lambda pair: pair[1].begin):
            slot, kind = slots[name], _FLOATING[stored.kind]
            target = parameters[slot.parameter][slot.index].view(-1)
            count = _PIECE // kind.itemsize
            for first in range(0, target.numel(), count):
                part = target[first : first + count]
                yield _Piece(files[file], stored.begin + first * kind.itemsize, kind, part)


def _fill(pieces: Iterator[_Piece], total: int, device: torch.device, threads: int) -> None:
    """Move all ``pieces``, ``total`` bytes, in ``threads`` threads; the first error ends it."""
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
        """Return when everything has arrived."""
        for _, arrived in self._ring:
            arrived()

    def _buffer(self) -> Tensor:
        return torch.empty(_PIECE, dtype=torch.uint8)

    def _send(self, values: Tensor, target: Tensor) -> Callable[[], object]:
        """Begin to copy; returns what waits until ``values`` may be overwritten."""
        target.copy_(values)
        return lambda: None


class _CudaLane(_Lane):
    """Through pinned memory, on a stream of its own: reads, copies and other threads' copies overlap."""

    buffers = 2

    def __init__(self, device: torch.device):
        super().__init__(device)
        torch.cuda.synchronize(device)  # what used the parameters' memory before them may still be at work on it
        self._stream = torch.cuda.Stream(device)

    def _buffer(self) -> Tensor:
        return torch.empty(_PIECE, dtype=torch.uint8, pin_memory=True)

    def _send(self, values: Tensor, target: Tensor) -> Callable[[], object]:
        with torch.cuda.stream(self._stream):
            if values.dtype != target.dtype:
                # converted there: copy_ would convert here, in memory that is not pinned
                values = values.to(target.device, non_blocking=True)
            target.copy_(values, non_blocking=True)
            event = torch.cuda.Event()
            event.record(self._stream)
        return event.synchronize


_LANES: dict[str, type[_Lane]] = {"cuda": _CudaLane}


def _give_memory(model: KimiVL, device: torch.device) -> None:
    """Parameters on ``device`` in the place of those without memory, not filled yet."""
    for module in model.modules():
        for name, value in list(module.named_parameters(recurse=False)):
            # not Module.to_empty: to make an empty tensor like one without memory, torch imports half a second of sympy
            empty = memory.empty(value.shape, value.dtype, device)
            setattr(module, name, torch.nn.Parameter(empty, requires_grad=False))
