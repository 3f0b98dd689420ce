"""Verifies a checkpoint folder: each file has the hash that its name or a manifest gives, and no link leads outside.

Files that operating systems leave are ignored. A marker beside the folder records sizes and times of a verified folder,
so that later starts read no contents. Knows no network, and of parameters only what `loader.check` accepts.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from . import loader
from .foreign import is_foreign
from .progress import Progress, amount

log = logging.getLogger(__name__)

Stamps = dict[str, tuple[int, int, int]]
"""Size, time of change in ns and inode of every file of a folder, by its name."""

Expected = dict[str, list[tuple[str, ...]]]
"""For each file, by its name: of every entry one hash must be that of its content."""

# Files that must be there beside the configuration and the tensors: one of each group.
_COMPANIONS = (
    ("tiktoken.model",),
    ("tokenizer_config.json",),
    ("preprocessor_config.json", "processor_config.json"),
)
_MARKER_VERSION = 1
_SHA256 = re.compile(r"[0-9a-f]{64}")
_GIT = re.compile(r"[0-9a-f]{40}")
_BUFFER = 2**20  # stays in a core's own cache while it is hashed


class DamagedError(CheckpointError):
    """Files whose content does not have the expected hash; ``files`` are their resolved paths."""

    def __init__(self, message: str, files: list[Path]):
        super().__init__(message)
        self.files = files


@dataclass(frozen=True)
class Manifest:
    """Hashes from outside the folder. ``digest`` is that of the manifest file, ``model`` the requested name."""

    digest: str
    model: str
    revision: str
    files: Mapping[str, tuple[int, str]]

    @classmethod
    def read(cls, path: Path) -> Manifest:
        try:
            content = path.read_bytes()
            data = json.loads(content)
            files = {str(name): (int(entry["size"]), str(entry["sha256"])) for name, entry in data["files"].items()}
            model, revision = (str(data.get(name) or "") for name in ("model", "revision"))
        except OSError as error:
            raise CheckpointError(
                f"{path}: the manifest cannot be read ({error.strerror}); check KIMI_VL_MANIFEST"
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise CheckpointError(
                f"{path}: is no manifest; write one with scripts/fetch_weights --write-manifest"
            ) from None
        if not files or not all(_SHA256.fullmatch(digest) for _, digest in files.values()):
            raise CheckpointError(f"{path}: lists no files, or one without its SHA-256; write the manifest anew")
        return cls(hashlib.sha256(content).hexdigest(), model, revision, files)


def checkpoint_folder(root: Path) -> Path:
    """The folder with ``config.json``: ``root`` itself, or the snapshot inside a Hugging Face cache tree."""
    if (root / "config.json").exists():
        return root
    trees = [root, *sorted(root.glob("models--*")), *sorted(root.glob("*/models--*"))]
    snapshots = [path.parent for tree in trees for path in sorted(tree.glob("snapshots/*/config.json"))]
    for tree in trees:
        main = tree / "refs" / "main"
        if main.is_file():
            snapshots = [
                path for path in snapshots if path.name == main.read_text(errors="replace").strip()
            ] or snapshots
    if len(snapshots) != 1:
        raise CheckpointError(f"{root}: holds {'no' if not snapshots else 'more than one'} checkpoint (config.json)")
    return snapshots[0]


def is_snapshot(folder: Path) -> bool:
    """Whether ``folder`` is in a Hugging Face cache tree, where names are hashes."""
    folder = Path(os.path.abspath(folder))
    return folder.parent.name == "snapshots" and (folder.parents[1] / "blobs").is_dir()


def check(folder: Path, manifest: Manifest | None = None, *, inside: Path | None = None) -> Stamps:
    """Verify all bytes of the checkpoint in ``folder``; returns its files' stamps, for :func:`mark`.

    In a Hugging Face cache tree, a blob of 64 hex digits is named by its SHA-256, one of 40 by its git blob hash.
    A file there in place of a link must be one of the blobs of its size that no link leads to; where there is none
    (the client moves blobs where it makes no links), its hash is not known, as in a plain folder.
    ``inside`` is a tree that nothing in it may leave, for what came from elsewhere. Raises :class:`CheckpointError`
    naming the first file at fault; the cheap checks come first.
    """
    if inside is not None:
        _confine(inside)
    stamps = _stamps(folder)
    expected = _expected(folder, stamps, manifest)
    try:
        loader.check(folder)
        for names in _COMPANIONS:
            if not stamps.keys() & set(names):
                raise CheckpointError(f"{folder / names[0]}: is missing")
    except CheckpointError:
        if expected:
            _hash(folder, stamps, expected)  # a damaged file is the better message, since it has a name
        raise
    if expected:
        _hash(folder, stamps, expected)
    if unknown := len(stamps) - len(expected):
        log.info(
            "%s: no hash is known of %s, so only names, shapes and types are checked",
            folder,
            f"{unknown} of {len(stamps)} files" if expected else "any file",
        )
    if _stamps(folder) != stamps:
        raise CheckpointError(f"{folder}: changed while it was verified; start again when nothing writes to it")
    return stamps


def sha256(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """The SHA-256 of files in ``folder``, computed on all cores."""
    names = list(names)
    progress = Progress("hashing", sum((folder / name).stat().st_size for name in names))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        digests = list(pool.map(lambda name: _digest(folder / name, hashlib.sha256(), progress), names))
    progress.finish("hashed")
    return dict(zip(names, digests, strict=True))


def write_manifest(folder: Path, model: str, path: Path) -> None:
    """Write the marker: the verified state of ``folder``, with which later starts compare."""
    stamps = _stamps(folder)
    digests = sha256(folder, stamps)
    files = {name: {"size": stamps[name][0], "sha256": digests[name]} for name in stamps}
    revision = folder.name if is_snapshot(folder) else ""
    _write_whole(path, {"model": model, "revision": revision, "files": files}, indent=2)


def is_marked(marker: Path, folder: Path, manifest: Manifest | None) -> bool:
    """Whether ``folder`` is unchanged since it was verified, by sizes and times: no content is read."""
    try:
        return json.loads(marker.read_bytes()) == _mark(folder, manifest, _stamps(folder))
    except (OSError, ValueError):
        return False


def mark(marker: Path, folder: Path, manifest: Manifest | None, stamps: Stamps) -> None:
    _write_whole(marker, _mark(folder, manifest, stamps))


def _mark(folder: Path, manifest: Manifest | None, stamps: Stamps) -> dict[str, Any]:
    return {
        "version": _MARKER_VERSION,
        "folder": folder.name,
        "manifest": manifest.digest if manifest else None,
        "files": {name: list(stamp) for name, stamp in stamps.items()},
    }


def _write_whole(path: Path, data: Mapping[str, Any], indent: int | None = None) -> None:
    """Write a file atomically: readers find the old content or the new one, also after a crash."""
    handle, temporary = tempfile.mkstemp(prefix=f"{path.name}.part-", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(data, file, indent=indent, sort_keys=True)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


# What the folder has


def _names(folder: Path) -> Iterator[str]:
    """The files and links below ``folder``, without foreign ones; a link to a folder is included."""
    pending = [""]
    while pending:
        above = pending.pop()
        for item in os.scandir(folder / above):
            name = os.path.join(above, item.name)
            if is_foreign(item.name):
                continue
            if item.is_dir(follow_symlinks=False):
                pending.append(name)
            else:
                yield name


def _stamps(folder: Path) -> Stamps:
    stamps: Stamps = {}
    for name in sorted(_names(folder)):
        try:
            status = (folder / name).stat()
        except OSError as error:
            raise CheckpointError(f"{folder / name}: cannot be read, or links to nothing ({error.strerror})") from None
        stamps[name] = (status.st_size, status.st_mtime_ns, status.st_ino)
    return stamps


def _confine(tree: Path) -> None:
    inside = tree.resolve()
    for name in _names(tree):
        path = tree / name
        if path.is_symlink() and not path.resolve().is_relative_to(inside):
            raise CheckpointError(f"{path}: links to a place outside the checkpoint")
        if not (path.is_file() or path.is_dir()):
            raise CheckpointError(f"{path}: is neither a file nor a folder, or links to nothing")


# What it should have


def _expected(folder: Path, stamps: Stamps, manifest: Manifest | None) -> Expected:
    """The hashes that files must have, without the files of which none is known."""
    expected: Expected = {name: [] for name in stamps}
    if manifest is not None:
        _compare_names(folder, stamps, manifest)
        for name in stamps:
            expected[name].append((manifest.files[name][1],))
    if is_snapshot(folder):
        unlinked = _unlinked_blobs(folder.absolute().parents[1])
        for name, hashes in expected.items():
            if (folder / name).is_symlink():
                hashes.append((_blob(folder, name).name,))
            elif manifest is None and (blobs := unlinked.get(stamps[name][0])):
                hashes.append(tuple(blobs))
    return {name: hashes for name, hashes in expected.items() if hashes}


def _unlinked_blobs(tree: Path) -> dict[int, list[str]]:
    """The blobs that no snapshot of ``tree`` links to, by size: a copy of the tree has files in place of links.

    A blob with a link belongs to that file, and not to another one of the same size.
    """
    links = {os.path.basename(os.readlink(path)) for path in tree.glob("snapshots/*/**/*") if path.is_symlink()}
    blobs: dict[int, list[str]] = {}
    for path in sorted((tree / "blobs").iterdir()):
        if (_SHA256.fullmatch(path.name) or _GIT.fullmatch(path.name)) and path.name not in links and path.is_file():
            blobs.setdefault(path.stat().st_size, []).append(path.name)
    return blobs


def _compare_names(folder: Path, stamps: Stamps, manifest: Manifest) -> None:
    if manifest.revision and is_snapshot(folder) and folder.name != manifest.revision:
        raise CheckpointError(f"{folder}: the manifest is of another revision, {manifest.revision}")
    listed = {name for name in manifest.files if not is_foreign(name)}
    for name in sorted(stamps.keys() | listed):
        if name not in stamps:
            raise CheckpointError(f"{folder / name}: is missing, but the manifest lists it")
        if name not in manifest.files:
            raise CheckpointError(f"{folder / name}: is not in the manifest")
        size, wanted = stamps[name][0], manifest.files[name][0]
        if size != wanted:
            raise CheckpointError(f"{folder / name}: has {size} bytes, but the manifest says {wanted}")


def _blob(folder: Path, name: str) -> Path:
    """The blob that a file of a snapshot links to, by the link's text alone."""
    path = folder / name
    target = os.readlink(path)
    blob = Path(os.path.normpath(path.parent.absolute() / target))
    if os.path.isabs(target) or blob.parent != folder.absolute().parents[1] / "blobs":
        raise CheckpointError(f"{path}: does not link to a blob of its own tree; fetch the model anew")
    if not (_SHA256.fullmatch(blob.name) or _GIT.fullmatch(blob.name)):
        raise CheckpointError(
            f"{path}: links to a blob whose name is no hash ({blob.name[:80]!r}); fetch the model anew"
        )
    return blob


def _hash(folder: Path, stamps: Stamps, expected: Expected) -> None:
    jobs = sorted(
        ((name, hashes) for name, needed in expected.items() for hashes in set(needed)),
        key=lambda job: -stamps[job[0]][0],  # largest first, so that all cores end at about the same time
    )
    total = sum(stamps[name][0] for name, _ in jobs)
    log.info("verifying %s: %d files, %s", folder, len(expected), amount(total))
    progress = Progress("verifying", total)

    def good(job: tuple[str, tuple[str, ...]]) -> bool:
        name, hashes = job
        found = set()
        if any(_SHA256.fullmatch(digest) for digest in hashes):
            found.add(_digest(folder / name, hashlib.sha256(), progress))
        if any(_GIT.fullmatch(digest) for digest in hashes):
            hasher = hashlib.sha1(f"blob {stamps[name][0]}\0".encode(), usedforsecurity=False)
            found.add(_digest(folder / name, hasher, progress))
        return not found.isdisjoint(hashes)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        bad = [job for job, fine in zip(jobs, pool.map(good, jobs), strict=True) if not fine]
    if bad:
        more = f" (and so are {len(bad) - 1} more)" if len(bad) > 1 else ""
        raise DamagedError(
            f"{folder / bad[0][0]}: is damaged or was altered, its hash is not {' or '.join(bad[0][1])}{more}",
            [(folder / name).resolve() for name, _ in bad],
        )
    progress.finish("verified")


def _digest(path: Path, hasher: Any, progress: Progress) -> str:
    buffer = memoryview(bytearray(_BUFFER))
    try:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                hasher.update(buffer[:count])
                progress.add(count)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); check the disk") from None
    return hasher.hexdigest()
