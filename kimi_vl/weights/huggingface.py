"""Fetches a repository of the Hugging Face Hub into its client's cache tree, finds it there, and repairs it.

The only file that imports huggingface_hub. Its client never fetches a file again whose name exists.
"""

from __future__ import annotations

import errno
import logging
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from . import download, http
from .progress import Progress, amount

log = logging.getLogger(__name__)

_NEEDED = ["*.json", "*.safetensors", "tiktoken.model"]
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)


def tree_of(cache: Path, name: str) -> Path:
    return cache / f"models--{name.replace('/', '--')}"


def repository_of(folder: Path) -> str:
    """The repository of the snapshot ``folder`` in a client's tree; empty for any other folder."""
    snapshots = folder.resolve().parent
    kind, _, name = snapshots.parent.name.partition("--")
    return name.replace("--", "/", 1) if snapshots.name == "snapshots" and kind == "models" else ""


def snapshot(tree: Path, revision: str) -> Path | None:
    """The snapshot folder of ``revision`` (empty: the main branch) in ``tree``, perhaps incomplete; None if absent."""
    try:
        commit = (tree / "refs" / (revision or "main")).read_text().strip()
    except (OSError, ValueError):
        commit = revision
    folder = tree / "snapshots" / commit
    return folder if commit and folder.is_dir() else None


def discard(folder: Path, damaged: list[Path], *, keep_files: bool) -> None:
    """Delete what the client would not fetch again: damaged files, and the links of the snapshot ``folder``.

    Files in place of links are the only copy where the client makes no links: with ``keep_files`` those that are not
    known to be damaged stay, so that only what is missing is fetched.
    """
    for file in damaged:
        file.unlink(missing_ok=True)
    if not keep_files:
        shutil.rmtree(folder, ignore_errors=True)
    for path in folder.rglob("*"):
        if path.is_symlink():
            path.unlink()


def fetch(name: str, revision: str, cache: Path) -> Path:
    """Fetch the missing files of the repository ``name``; returns the snapshot folder, which is not verified."""
    tree = tree_of(cache, name)
    for leftover in tree.glob("blobs/*.incomplete"):  # of a process that was killed; the client does not resume them
        leftover.unlink(missing_ok=True)
    download_snapshot = _client(name, revision, cache)
    shown = f"{name}@{revision}" if revision else name
    log.info("fetching %s from the Hugging Face Hub", shown)
    try:
        needed = sum(file.file_size or 0 for file in download_snapshot(dry_run=True) if file.will_download)
        download.check_space(cache, needed, shown)
        with _watched(tree, needed):
            return Path(download_snapshot())
    except CheckpointError:
        raise
    except Exception as error:  # of any network library: the message names the repository and what to do
        raise _explained(shown, error, cache) from None


def _client(name: str, revision: str, cache: Path) -> Any:
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.utils import disable_progress_bars

    # each tree has blobs of its own: a damaged one is fetched again and not found elsewhere
    constants.HF_HUB_DISABLE_SHARED_BLOBS = True
    disable_progress_bars()
    for handler in logging.getLogger("huggingface_hub").handlers:
        if not any(isinstance(known, http.Redaction) for known in handler.filters):
            handler.addFilter(http.Redaction())

    def download_snapshot(**options: Any) -> Any:
        return huggingface_hub.snapshot_download(
            name, revision=revision or None, cache_dir=cache, allow_patterns=_NEEDED, **options
        )

    return download_snapshot


def _explained(shown: str, error: BaseException, cache: Path) -> CheckpointError:
    from huggingface_hub import errors

    if isinstance(error, errors.DryRunError | errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    answered = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else 0
    if isinstance(error, errors.GatedRepoError):
        return CheckpointError(f"{shown}: accept its terms on the Hub and set HF_TOKEN, then start again")
    if isinstance(error, errors.RevisionNotFoundError):
        return CheckpointError(f"{shown}: the Hub has no such revision; check what follows the @")
    if isinstance(error, errors.RepositoryNotFoundError) or answered in (401, 403, 404):
        return CheckpointError(f"{shown}: is not on the Hub or is private; check the name, or set HF_TOKEN")
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        return download.disk_error(cache, error)
    kind = type(error).__name__
    return CheckpointError(f"{shown}: could not be fetched from the Hub ({kind}); check the network and start again")


@contextmanager
def _watched(tree: Path, total: int) -> Iterator[None]:
    """Log progress by the size of the tree's blobs while the client fetches them."""

    def size() -> int:
        return sum(path.stat().st_size for path in tree.glob("blobs/*") if path.is_file())

    def watch() -> None:
        while not done.wait(0.5):
            try:
                progress.reach(size() - before)
            except OSError:  # renamed in the meantime
                continue

    before, progress, done = size(), Progress("fetching", total), threading.Event()
    log.info("%s to fetch", amount(total))
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    progress.reach(size() - before)
    progress.finish("fetched")
