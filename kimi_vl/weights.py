"""Model names to verified folders on disk: fetch, check, and only then put in place.

Knows nothing of parameters beyond what a checkpoint's own headers say. No remote code is fetched or run.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from . import loader
from .errors import CheckpointError

log = logging.getLogger(__name__)

DEMO = Path(__file__).parent / "demo"
DEFAULT_WEIGHTS_URL = "https://weights.replicate.delivery/default/kimi-vl-a3b-thinking/model_cache/"
# The published archive is a Hugging Face cache tree. The modules.tar beside it holds remote code, which we never run.
ARCHIVES = {"thinking": "models--moonshotai--Kimi-VL-A3B-Thinking.tar"}
REPOSITORIES = {
    "thinking-2506": "moonshotai/Kimi-VL-A3B-Thinking-2506",
    "instruct": "moonshotai/Kimi-VL-A3B-Instruct",
}
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_MARKER = ".kimi_vl_verified"
_TRIES = 3
_STALL_S = 120  # pget has no read timeout: a download that does not grow for this long is begun again


def resolve(model: str, *, has_gpu: bool, cache: str | Path | None = None) -> Path:
    """The checkpoint folder of ``model``, fetched and verified where it is not there yet.

    ``model`` is ``thinking``, ``thinking-2506``, ``instruct``, ``demo``, ``auto`` (the first with a GPU, else the
    demo), a directory, a Hugging Face repository id (``@revision`` may follow), or an https URL of a tar. ``cache``
    None is ``model_cache`` in the working directory. Raises :class:`CheckpointError` saying what to do.
    """
    if model == "auto":
        model = "thinking" if has_gpu else "demo"
    if model == "demo":
        return DEMO
    cache = Path(cache or "model_cache")
    if model and Path(model).is_dir():
        return checkpoint_folder(Path(model))
    if model in ARCHIVES:
        base = os.environ.get("KIMI_VL_WEIGHTS_URL") or DEFAULT_WEIGHTS_URL
        return _from_archive(base.rstrip("/") + "/" + ARCHIVES[model], cache)
    if model.startswith(("https://", "http://127.0.0.1", "http://localhost")):
        return _from_archive(model, cache)
    repository = REPOSITORIES.get(model, model)
    if _REPOSITORY.fullmatch(repository) and not repository.startswith((".", "/")):
        return _from_hub(repository, cache)
    names = ", ".join([*ARCHIVES, *REPOSITORIES, "demo", "auto"])
    raise CheckpointError(
        f"model {model!r} is neither one of {names}, nor a directory, a Hugging Face repository id or an https URL"
    )


def checkpoint_folder(root: Path) -> Path:
    """The folder with ``config.json``: ``root`` itself, or the snapshot inside a Hugging Face cache tree."""
    if (root / "config.json").exists():
        return root
    trees = [root, *sorted(root.glob("models--*")), *sorted(root.glob("*/models--*"))]
    snapshots = [path.parent for tree in trees for path in sorted(tree.glob("snapshots/*/config.json"))]
    for tree in trees:
        main = tree / "refs" / "main"
        if main.is_file():
            snapshots = [path for path in snapshots if path.name == main.read_text().strip()] or snapshots
    if len(snapshots) != 1:
        raise CheckpointError(f"{root}: holds {'no' if not snapshots else 'more than one'} checkpoint (config.json)")
    return snapshots[0]


def verify(root: Path) -> None:
    """Check a fetched tree to the byte: links stay inside, blobs have their hashes, headers fit the config.

    In a Hugging Face cache a blob of 64 hex digits is named by its SHA-256, one of 40 by its git blob hash. Raises
    :class:`CheckpointError` naming the first file at fault.
    """
    inside = root.resolve()
    for path in root.rglob("*"):
        if path.is_symlink() and not path.resolve().is_relative_to(inside):
            raise CheckpointError(f"{path}: links to a place outside the checkpoint")
        if not (path.is_file() or path.is_dir()):
            raise CheckpointError(f"{path}: is neither a file nor a folder, or links to nothing")
    blobs = [path for path in root.rglob("blobs/*") if path.is_file()]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for blob, good in zip(blobs, pool.map(_has_named_hash, blobs), strict=True):
            if not good:
                raise CheckpointError(f"{blob}: its content does not match the hash that is its name")
    loader.check(checkpoint_folder(root))


def _has_named_hash(blob: Path) -> bool:
    if re.fullmatch(r"[0-9a-f]{64}", blob.name):
        digest = hashlib.sha256()
    elif re.fullmatch(r"[0-9a-f]{40}", blob.name):
        digest = hashlib.sha1(f"blob {blob.stat().st_size}\0".encode(), usedforsecurity=False)
    else:
        return False
    with blob.open("rb") as file:
        while chunk := file.read(2**22):
            digest.update(chunk)
    return digest.hexdigest() == blob.name


def _from_hub(repository: str, cache: Path) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    name, _, revision = repository.partition("@")
    log.info("fetching %s from the Hugging Face Hub", repository)
    try:
        snapshot_download(
            name,
            revision=revision or None,
            cache_dir=cache,
            allow_patterns=["*.json", "*.safetensors", "tiktoken.model"],
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise CheckpointError(f"{repository}: cannot be fetched from the Hub ({type(error).__name__})") from None
    tree = cache / f"models--{name.replace('/', '--')}"
    verify(tree)
    return checkpoint_folder(tree)


def _from_archive(url: str, cache: Path) -> Path:
    name = Path(urlsplit(url).path).name.removesuffix(".tar")
    if not name:
        raise CheckpointError("the URL of the weights names no file; it must end in NAME.tar")
    final = cache / name
    with _locked(cache, name):
        for leftover in cache.glob(f"{name}.part-*"):  # of a boot that was killed: the lock says that none is at work
            shutil.rmtree(leftover, ignore_errors=True)
        if final.is_dir():
            if (final / _MARKER).exists():
                return checkpoint_folder(final)
            log.info("checking %s, which carries no mark of an earlier check", final)
            verify(final)
        else:
            part = cache / f"{name}.part-{os.getpid()}"
            try:
                _fetch(url, part)
                log.info("verifying %s", name)
                verify(part)
                _sync(part)
                part.rename(final)
            finally:
                shutil.rmtree(part, ignore_errors=True)
        (final / _MARKER).touch()
        _sync_folder(final)
    return checkpoint_folder(final)


@contextmanager
def _locked(cache: Path, name: str) -> Iterator[None]:
    """One boot at a time works on ``name``; a second one waits and finds the work done."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        handle = (cache / f"{name}.lock").open("w")
    except OSError as error:
        if (cache / name / _MARKER).exists():  # a read-only cache that is complete needs no lock
            yield
            return
        raise CheckpointError(f"{cache}: cannot be written ({error.strerror}); make the folder writable") from None
    with handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _fetch(url: str, part: Path) -> None:
    shown = urlsplit(url)._replace(query="", fragment="", netloc=urlsplit(url).netloc.rpartition("@")[2]).geturl()
    program = os.environ.get("PGET") or shutil.which("pget")
    if program is None:
        log.info("pget is not on PATH: fetching with Python")
    reason = ""
    for attempt in range(1, _TRIES + 1):
        shutil.rmtree(part, ignore_errors=True)
        log.info("fetching %s (try %d of %d)", shown, attempt, _TRIES)
        began = time.monotonic()
        try:
            _fetch_with_pget(program, url, part) if program else _fetch_with_python(url, part)
        except (OSError, tarfile.TarError, CheckpointError) as error:
            reason = str(error) if isinstance(error, CheckpointError) else type(error).__name__
            log.warning("try %d failed: %s", attempt, reason)
            continue
        size, seconds = _size(part), time.monotonic() - began
        log.info("fetched %.2f GB in %.1f s (%.2f GB/s)", size / 1e9, seconds, size / 1e9 / max(seconds, 1e-9))
        return
    raise CheckpointError(f"{shown}: cannot be fetched ({reason}); check the address, the network and the free disk")


def _fetch_with_pget(program: str, url: str, part: Path) -> None:
    process = subprocess.Popen(
        [program, "-x", "--pid-file", f"{part}.pid", "--log-level", "warn", url, str(part)],
        stdout=sys.stderr,
        stderr=sys.stderr,
        env={name: value for name, value in os.environ.items() if name not in ("PGET_EXTRACT", "PGET_FORCE")},
    )
    try:
        _watch(process, part)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        Path(f"{part}.pid").unlink(missing_ok=True)
    if process.returncode:
        raise CheckpointError(f"pget ended with status {process.returncode}")


def _watch(process: subprocess.Popen[bytes], part: Path) -> None:
    """Wait for a download that grows; report on it every few seconds."""
    size, grown_at, reported_at = 0, time.monotonic(), time.monotonic()
    while process.poll() is None:
        time.sleep(0.2)
        now = time.monotonic()
        if now - reported_at >= 5:
            current = _size(part)
            log.info("%.2f GB on disk, %.0f MB/s", current / 1e9, (current - size) / 1e6 / (now - reported_at))
            grown_at = now if current > size else grown_at
            size, reported_at = current, now
        if now - grown_at > _STALL_S:
            raise CheckpointError(f"no byte arrived for {_STALL_S} s")


def _fetch_with_python(url: str, part: Path) -> None:
    with (
        urllib.request.urlopen(url, timeout=_STALL_S) as response,
        tarfile.open(fileobj=response, mode="r|") as archive,
    ):
        archive.extractall(part, filter="data")


def _size(root: Path) -> int:
    return sum(path.lstat().st_size for path in root.rglob("*") if path.is_file() and not path.is_symlink())


def _sync(root: Path) -> None:
    for path in root.rglob("*"):
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
