"""Packs a checkpoint as a tar of a Hugging Face cache tree.

In such a tree every file is a blob named by its own hash, so the tar needs nothing beside it to be verified. The same
files always give the same tar. On the way weights may be quantised, a tensor at a time.
"""

from __future__ import annotations

import fnmatch
import hashlib
import io
import json
import logging
import os
import shutil
import tarfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..model.config import Config
from ..quantization import scheme as schemes
from ..quantization import search
from . import compressed_tensors, download, loader, verify
from .foreign import is_foreign
from .progress import Progress
from .shards import KINDS, Stored, opened, read_headers

log = logging.getLogger(__name__)

# What the service reads, and what has to go with the weights. No code: it would never be run.
PACKED = ["*.json", "*.safetensors", "tiktoken.model", "README.md", "LICENSE*", "NOTICE*"]

QUANTIZED_CARD = """

## Quantised weights

The decoder's matrices of this copy were made {form} with `kimi-vl pack --quantize {form}`; what is said above is of the
original. It loads as any checkpoint in compressed-tensors form does.
"""
"""What a quantised folder's model card ends with."""
_COPY = 2**22


@dataclass(frozen=True)
class Packed:
    size: int
    sha256: str
    revision: str
    left_out: list[str]


def pack_quantized(directory: Path, out: Path, form: str) -> Packed | None:
    """Quantise the checkpoint in ``directory`` as ``form`` says, and :func:`pack` the result.

    Where ``out`` is not named as a tar it becomes a folder, and the result is None.
    """
    if out.suffix != ".tar":
        write_quantized(directory, out, form)
        return None
    between = out.with_name(f"{out.name}.{form}")
    if not out.exists():
        write_quantized(directory, between, form)
    try:
        return pack(between, out)
    finally:
        shutil.rmtree(between, ignore_errors=True)


def pack(directory: Path, out: Path) -> Packed:
    """Write the checkpoint in ``directory`` to the tar ``out``, which appears when it is complete."""
    if out.suffix != ".tar" or out.exists():
        raise CheckpointError(f"{out}: {'is there already' if out.exists() else 'does not end in .tar'}; name another")
    folder = verify.checkpoint_folder(directory)
    names, left_out = _choose(folder)
    before = _stamps(folder, names)
    blobs, revision = _name_blobs(folder, names)
    total = sum(size for size, _, _ in before.values())
    part = out.with_name(f"{out.name}.part")
    try:
        download.check_space(out.parent, total, out.name)
        with part.open("wb") as file:
            target = _Hashing(file)
            _write(target, folder, blobs, revision, Progress("packing", total))
            file.flush()
            os.fsync(file.fileno())
        if _stamps(folder, names) != before:
            raise CheckpointError(f"{folder}: changed while it was packed; pack it again when nothing writes to it")
        os.replace(part, out)
    except OSError as error:
        raise download.disk_error(out.parent, error) from None
    finally:
        part.unlink(missing_ok=True)
    return Packed(target.size, target.sha256.hexdigest(), revision, left_out)


class _Hashing:
    """A file to write to that knows its hash and size."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.sha256 = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.size += len(data)
        return self.file.write(data)

    def tell(self) -> int:
        return self.size


def _choose(folder: Path) -> tuple[list[str], list[str]]:
    """The names that are packed, and those that are not."""
    names = sorted(path.name for path in folder.iterdir() if not is_foreign(path.name))
    packed = [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in PACKED)]
    packed = [name for name in packed if (folder / name).is_file()]
    return packed, [name for name in names if name not in packed]


def _stamps(folder: Path, names: list[str]) -> dict[str, tuple[int, int, int]]:
    stamps = {}
    for name in names:
        status = (folder / name).stat()
        stamps[name] = (status.st_size, status.st_mtime_ns, status.st_ino)
    return stamps


def _name_blobs(folder: Path, names: list[str]) -> tuple[dict[str, str], str]:
    """The blob's name of every file, and the revision: those of the tree where it is one, else from the contents."""
    if verify.is_snapshot(folder):
        verify.check(folder)
        links = {name: os.readlink(folder / name) for name in names if (folder / name).is_symlink()}
        files = verify.sha256(folder, [name for name in names if name not in links])
        return files | {name: os.path.basename(target) for name, target in links.items()}, folder.name
    loader.check(folder)
    blobs = verify.sha256(folder, names)
    listing = "".join(f"{blobs[name]}  {name}\n" for name in names)
    return blobs, hashlib.sha1(listing.encode(), usedforsecurity=False).hexdigest()


def _write(target: Any, folder: Path, blobs: dict[str, str], revision: str, progress: Progress) -> None:
    """Small files first, so that a reader of the beginning knows the model; links last, as they are extracted."""
    snapshot = f"snapshots/{revision}"
    with tarfile.TarFile(fileobj=target, mode="w", format=tarfile.PAX_FORMAT, copybufsize=_COPY) as tar:
        for name in ("blobs", "refs", "snapshots", snapshot):
            tar.addfile(_entry(name, tarfile.DIRTYPE))
        content = revision.encode()
        tar.addfile(_entry("refs/main", tarfile.REGTYPE, len(content)), io.BytesIO(content))
        written = set()
        for name in sorted(blobs, key=lambda name: (name.endswith(".safetensors"), name)):
            if blobs[name] in written:
                continue
            written.add(blobs[name])
            with (folder / name).open("rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                tar.addfile(_entry(f"blobs/{blobs[name]}", tarfile.REGTYPE, size), file)
            progress.add(size)
        for name in sorted(blobs):
            link = _entry(f"{snapshot}/{name}", tarfile.SYMTYPE)
            link.linkname = f"../../blobs/{blobs[name]}"
            tar.addfile(link)
    progress.finish("packed")


def _entry(name: str, kind: bytes, size: int = 0) -> tarfile.TarInfo:
    """Owner, group and time stay zero: nothing of this machine goes into the tar."""
    entry = tarfile.TarInfo(name)
    entry.type, entry.size, entry.mode = kind, size, 0o755 if kind == tarfile.DIRTYPE else 0o644
    return entry


# Quantising


def write_quantized(directory: Path, out: Path, form: str) -> None:
    """Write the floating-point checkpoint in ``directory`` to the folder ``out``, its weights quantised as ``form``.

    The folder appears when it is complete. Its files have the names of those they are made from, and of each thread one
    tensor is in memory.
    """
    if out.exists():
        raise CheckpointError(f"{out}: is there already; name another")
    folder = verify.checkpoint_folder(directory)
    verify.check(folder)
    config = Config.from_directory(folder)
    if config.quantization is not None:
        raise CheckpointError(f"{folder}: is quantised already; take the published checkpoint")
    plan = loader.Plan(loader.empty_model(config), None, form)
    headers = read_headers(folder, plan.expected)
    files = {file: _Shard(header, plan) for file, header in headers.items()}
    names, _ = _choose(folder)
    before = _stamps(folder, names)
    part = out.with_name(f"{out.name}.part")
    progress = Progress("quantising", sum(stored.nbytes for header in headers.values() for stored in header.values()))
    shutil.rmtree(part, ignore_errors=True)  # of one that was killed
    try:
        part.mkdir()
        download.check_space(part, sum(shard.size for shard in files.values()), out.name)
        for file, shard in files.items():
            shard.write(folder / file, part / file, progress)
        for name in names:
            if not name.endswith((".safetensors", ".safetensors.index.json")):
                shutil.copyfile(folder / name, part / name)
        _write_json(part / "config.json", _values(folder / "config.json") | {
            "quantization_config": schemes.to_config(schemes.form(form))
        })  # fmt: skip
        with (part / "README.md").open("a", encoding="utf-8") as card:
            card.write(QUANTIZED_CARD.format(form=form))
        if (index := folder / "model.safetensors.index.json").exists():
            weight_map = {name: file for file, shard in files.items() for name in shard.places}
            total = {"total_size": sum(shard.size for shard in files.values())}
            _write_json(part / index.name, {"metadata": total, "weight_map": dict(sorted(weight_map.items()))})
        if _stamps(folder, names) != before:
            raise CheckpointError(f"{folder}: changed while it was read; start again when nothing writes to it")
        loader.check(part)
        part.rename(out)
    except OSError as error:
        raise download.disk_error(out.parent, error) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    progress.finish("quantised")


class _Shard:
    """One safetensors file to be written: ``places`` has where the bytes of each of its tensors begin."""

    def __init__(self, source: Mapping[str, Stored], plan: loader.Plan):
        self._source, self._plan = source, plan
        entries: dict[str, tuple[str, tuple[int, ...], int]] = {}
        for name, stored in source.items():
            scheme = plan.held.get(name)
            if scheme is None:
                entries[name] = stored.kind, stored.shape, stored.nbytes
                continue
            for part, expected in compressed_tensors.stored_tensors(name, stored.shape, scheme).items():
                kind = "BF16" if part.endswith("_scale") else expected.kinds[0]
                nbytes = torch.Size(expected.shape).numel() * KINDS[kind].itemsize
                entries[part] = kind, expected.shape, nbytes
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self.places, self.size = {}, 0
        # each is aligned to its type where the wider ones come first
        for name, (kind, shape, nbytes) in sorted(
            entries.items(), key=lambda entry: (-KINDS[entry[1][0]].itemsize, entry[0])
        ):
            self.places[name] = self.size
            self.size += nbytes
            header[name] = {"dtype": kind, "shape": [*shape], "data_offsets": [self.size - nbytes, self.size]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._head = len(text).to_bytes(8, "little") + text

    def write(self, source: Path, target: Path, progress: Progress) -> None:
        with ExitStack() as stack:
            read, write = stack.enter_context(opened(source)), stack.enter_context(target.open("wb", buffering=0))
            write.write(self._head)
            write.truncate(len(self._head) + self.size)

            def convert(name: str) -> None:
                stored = self._source[name]
                for part, values in self._tensors(name, loader.read_tensor(read, stored)):
                    view = values.contiguous().view(-1).view(torch.uint8).numpy().data
                    place = len(self._head) + self.places[part]
                    while view:
                        done = os.pwrite(write.fileno(), view, place)
                        view, place = view[done:], place + done
                progress.add(stored.nbytes)

            with ThreadPoolExecutor(loader.default_threads()) as pool:
                for _ in pool.map(convert, self._source):  # the first error comes out here
                    pass
            os.fsync(write.fileno())

    def _tensors(self, name: str, values: Tensor) -> Iterator[tuple[str, Tensor]]:
        scheme = self._plan.held.get(name)
        if scheme is None:
            yield name, values
        else:
            yield from compressed_tensors.as_stored(
                *search.quantize(values, scheme, name), name, tuple(values.shape)
            ).items()


def _values(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
