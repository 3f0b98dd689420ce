"""The headers of a checkpoint's safetensors files: what each file holds and where, read without any values.

Strict: a file's tensors follow one another from its header to its very end, and the files hold what is expected and
nothing besides. Knows no models.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError

FLOATING = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
KINDS = FLOATING | {
    "I64": torch.int64, "I32": torch.int32, "I8": torch.int8, "U8": torch.uint8, "F8_E4M3": torch.float8_e4m3fn,
}  # fmt: skip
"""Types of tensors by safetensors' names."""
_LONGEST_HEADER = 100_000_000  # bytes; safetensors itself takes no longer ones
_MOST_DIMENSIONS = 8


@dataclass(frozen=True)
class Expected:
    """A tensor that has to be there: its shape, and the types that it may have."""

    shape: tuple[int, ...]
    kinds: Sequence[str] = tuple(FLOATING)
    said: str = "a floating-point one"


@dataclass(frozen=True)
class Stored:
    """A tensor as a file has it: its type by safetensors' name, and where its bytes are, from the file's start."""

    kind: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


def read_headers(directory: Path, expected: Mapping[str, Expected]) -> dict[str, dict[str, Stored]]:
    """By file and tensor, what each file holds; :class:`CheckpointError` unless that is just what ``expected`` has."""
    promised = _shards(directory)
    headers: dict[str, dict[str, Stored]] = {}
    problems: list[str] = []
    for file in sorted(promised):
        path = directory / file
        if not path.exists():
            raise CheckpointError(f"{path}: is missing")
        held = headers[file] = read_header(path)
        wanted = promised[file] & expected.keys()
        problems += [f"{path}: tensor {name} is not in it" for name in sorted(promised[file] - held.keys())]
        problems += [f"{path}: unexpected tensor {name}" for name in sorted(held.keys() - wanted)]
        for name in sorted(held.keys() & wanted):
            problems += [f"{path}: tensor {name} {problem}" for problem in _misfits(held[name], expected[name])]
    found = {name for held in headers.values() for name in held}
    problems += [f"{directory}: missing tensor {name}" for name in sorted(expected.keys() - found)]
    if problems:
        more = f" (and {len(problems) - 5} more problems)" if len(problems) > 5 else ""
        raise CheckpointError("; ".join(problems[:5]) + more)
    return headers


def _misfits(stored: Stored, expected: Expected) -> Iterator[str]:
    if stored.shape != expected.shape:
        yield f"has shape {stored.shape}; {expected.shape} was expected"
    if stored.kind not in expected.kinds:
        yield f"has dtype {stored.kind}; {expected.said} was expected"


def _shards(directory: Path) -> dict[str, set[str]]:
    """File names with the tensors that the index (or the only file itself) says they hold."""
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        single = "model.safetensors"
        if not (directory / single).exists():
            raise CheckpointError(f"{directory}: holds neither {index.name} nor {single}")
        return {single: set(read_header(directory / single))}
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


def opened(path: Path) -> io.FileIO:
    try:
        return path.open("rb", buffering=0)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file, which must follow one another without gap or overlap to its very end."""
    with opened(path) as file:
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


def _parsed(text: bytes, begin: int, size: int) -> dict[str, Stored]:
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


def _stored(name: str, entry: Any, start: int) -> Stored:
    try:
        kind, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        # type() and not isinstance(): true and false are integers to Python
        good = type(kind) is str and type(shape) is list and len(shape) <= _MOST_DIMENSIONS
        if not (good and all(type(n) is int and n >= 0 for n in (*shape, begin, end)) and begin <= end):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"the entry of tensor {name} is not one") from None
    # other types are refused as such
    if kind in KINDS and math.prod(shape) * KINDS[kind].itemsize != end - begin:
        raise ValueError(f"tensor {name} has {end - begin} bytes, which is not {kind} of shape {tuple(shape)}")
    return Stored(kind, tuple(shape), start + begin, start + end)
