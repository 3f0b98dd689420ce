"""Packs a checkpoint as a tar of a Hugging Face cache tree.

In such a tree every file is a blob named by its own hash, so the tar needs nothing beside it to be verified. The same
files always give the same tar.
"""

from __future__ import annotations

import fnmatch
import hashlib
import io
import logging
import os
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import CheckpointError
from . import download, loader, verify
from .foreign import is_foreign
from .progress import Progress

log = logging.getLogger(__name__)

# What the service reads, and what has to go with the weights. No code: it would never be run.
PACKED = ["*.json", "*.safetensors", "tiktoken.model", "README.md", "LICENSE*", "NOTICE*"]
_COPY = 2**22


@dataclass(frozen=True)
class Packed:
    size: int
    sha256: str
    revision: str
    left_out: list[str]


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
