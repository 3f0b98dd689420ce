"""The entries of a tar: each is refused where it must not be extracted, and all are compared with the extracted folder.

Knows no network and no checkpoints.
"""

from __future__ import annotations

import os
import posixpath
import stat
import tarfile
from dataclasses import dataclass
from itertools import dropwhile
from pathlib import Path
from typing import NoReturn

from ..errors import CheckpointError
from .foreign import is_foreign

LARGEST_END = 2**20
"""Bytes to read after the last entry: more than any archive has of padding."""

_MOST_ENTRIES = 10_000
_END_MARK = 2 * tarfile.BLOCKSIZE


@dataclass(frozen=True)
class Entry:
    kind: str  # "file", "folder" or "link"
    size: int = 0
    target: str = ""


class Contents:
    """The entries of an archive, whose ``name`` is for messages only."""

    def __init__(self, name: str):
        self.name = name
        self.entries: dict[str, Entry] = {}
        self._above: set[str] = set()  # all folders with entries in them

    @property
    def size(self) -> int:
        return sum(entry.size for entry in self.entries.values())

    def add(self, member: tarfile.TarInfo) -> None:
        """Add an entry. Raises :class:`CheckpointError` where it must not be extracted after those before it."""
        name = posixpath.normpath(member.name)
        if member.name.startswith("/"):
            self._refuse(member, "has an absolute name")
        if ".." in member.name.split("/") or "\0" in member.name:
            self._refuse(member, "has a name that leads out of the archive")
        if len(self.entries) >= _MOST_ENTRIES:
            self._refuse(member, f"is one too many ({_MOST_ENTRIES} are allowed)")
        entry = self._entry(member, name)
        if name == ".":
            if entry.kind != "folder":
                self._refuse(member, "has no name")
            return
        parts = name.split("/")
        above = {"/".join(parts[:count]) for count in range(1, len(parts))}
        if any(self.entries[folder].kind != "folder" for folder in above & self.entries.keys()):
            self._refuse(member, "lies below an entry that is not a folder")
        before = self.entries.get(name, Entry("folder") if name in self._above else None)
        if before is not None and (before.kind, entry.kind) != ("folder", "folder"):
            self._refuse(member, "is there twice")
        self.entries[name] = entry
        self._above |= above

    def finish(self) -> None:
        if not any(entry.kind == "file" for entry in self.entries.values()):
            raise CheckpointError(f"{self.name}: the archive holds no files; make it anew")

    def difference(self, tree: Path) -> str:
        """The first difference between ``tree`` and the archive, without foreign files; empty if there is none."""
        wanted = {folder: Entry("folder") for folder in self._above} | self.entries
        found = _on_disk(tree)
        for name in sorted(wanted.keys() | {name for name in found if not is_foreign(name)}):
            if name not in found:
                return f"{name[:200]!r} of the archive was not extracted"
            if wanted.get(name) != found[name]:
                return f"{name[:200]!r} was not extracted as it is in the archive"
        return ""

    def _entry(self, member: tarfile.TarInfo, name: str) -> Entry:
        if member.isdir():
            return Entry("folder")
        if member.issym():
            if _leads_out(name, member.linkname):
                self._refuse(member, "links to a place outside the archive")
            return Entry("link", target=member.linkname)
        if member.islnk():
            linked = self.entries.get(posixpath.normpath(member.linkname))
            if linked is None or linked.kind != "file":
                self._refuse(member, "is a hard link to something that is not a file before it in the archive")
            return Entry("file", linked.size)
        if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse():
            self._refuse(member, "is neither a plain file nor a folder nor a link")
        return Entry("file", member.size)

    def _refuse(self, member: tarfile.TarInfo, why: str) -> NoReturn:
        raise CheckpointError(f"{self.name}: the entry {member.name[:200]!r} {why}; the archive must be made anew")


def end_fault(rest: bytes) -> str:
    """What is wrong after the last entry: an archive that is cut off between two entries lacks only the end mark."""
    if any(rest) or len(rest) >= LARGEST_END:
        return "other data follows the archive"
    return "the archive is cut off (it has no end mark)" if len(rest) < _END_MARK else ""


def _leads_out(name: str, target: str) -> bool:
    """Whether a link may lead out. Also where ``..`` follows a name: that name may be a link, and all is open then."""
    parts = [part for part in target.split("/") if part not in ("", ".")]
    rest = list(dropwhile("..".__eq__, parts))
    climbs = len(parts) - len(rest)
    return target.startswith("/") or "\0" in target or ".." in rest or climbs > name.count("/")


def _on_disk(tree: Path) -> dict[str, Entry]:
    found: dict[str, Entry] = {}
    pending = [""] if tree.is_dir() else []
    while pending:
        folder = pending.pop()
        for item in os.scandir(tree / folder):
            name = posixpath.join(folder, item.name)
            status = item.stat(follow_symlinks=False)
            if stat.S_ISLNK(status.st_mode):
                found[name] = Entry("link", target=os.readlink(item.path))
            elif stat.S_ISDIR(status.st_mode):
                found[name] = Entry("folder")
                pending.append(name)
            else:
                found[name] = Entry("file" if stat.S_ISREG(status.st_mode) else "device", status.st_size)
    return found
