"""Model names to verified checkpoint folders: where a model comes from, what is cached, and what is fetched again.

Fetching is in `download` and `huggingface`, hashes are in `verify`. Knows nothing of parameters. Fetches no code.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from ..errors import CheckpointError
from . import download, http, huggingface, verify
from .verify import DamagedError, Manifest

log = logging.getLogger(__name__)

DEMO = Path(__file__).parents[1] / "demo"
MANIFESTS = Path(__file__).parents[1] / "manifests"
DEFAULT_WEIGHTS_URL = "https://weights.replicate.delivery/default/kimi-vl-a3b-thinking/model_cache/"
# The published archive is a Hugging Face cache tree. The modules.tar beside it has remote code and is never fetched.
ARCHIVES = {"thinking": "models--moonshotai--Kimi-VL-A3B-Thinking.tar"}
REPOSITORIES = {
    "thinking-2506": "moonshotai/Kimi-VL-A3B-Thinking-2506",
    "instruct": "moonshotai/Kimi-VL-A3B-Instruct",
}
# Every published name and repository id, and whether that model writes thinking before its answer. Their files do
# not say: configuration, chat template and generation settings are the same.
_THINKS = {
    "thinking": True,
    "moonshotai/kimi-vl-a3b-thinking": True,
    "thinking-2506": True,
    "moonshotai/kimi-vl-a3b-thinking-2506": True,
    "instruct": False,
    "moonshotai/kimi-vl-a3b-instruct": False,
}
_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*(@\w[\w./-]*)?")
# Suffixes of the files beside a cache entry, which no entry's name may have.
_RESERVED = re.compile(r"\.part-|\.(lock|verified)$")


def resolve(model: str, *, has_gpu: bool, cache: str | Path | None = None) -> Path:
    """The checkpoint folder of ``model``, fetched and verified if it is not in the cache.

    ``model`` is ``thinking``, ``thinking-2506``, ``instruct``, ``demo``, ``auto`` (the first with a GPU, else the
    demo), a directory, a Hugging Face repository id (``@revision`` may follow), or an https URL of a tar. ``cache``
    None is what KIMI_VL_CACHE names, else ``model_cache`` in the working directory. Raises :class:`CheckpointError`
    with a sentence that says what to do.
    """
    if model == "auto":
        model = "thinking" if has_gpu else "demo"
    if model == "demo":
        return DEMO
    cache = Path(cache or os.environ.get("KIMI_VL_CACHE") or "model_cache")
    manifest = _manifest(model)
    _always()  # a wrong setting is an error before anything is fetched
    try:
        if model and Path(model).is_dir():
            return _from_directory(Path(model), cache, manifest)
        if model in ARCHIVES:
            url = _below(os.environ.get("KIMI_VL_WEIGHTS_URL") or DEFAULT_WEIGHTS_URL, ARCHIVES[model])
            return _from_archive(url, ARCHIVES[model].removesuffix(".tar"), cache, manifest)
        if _is_url(model):
            return _from_archive(model, _name_of(model), cache, manifest)
        repository = REPOSITORIES.get(model, model)
        if _REPOSITORY.fullmatch(repository) and ".." not in repository:
            return _from_hub(repository, cache, manifest)
    except OSError as error:
        raise download.disk_error(cache, error) from None
    names = ", ".join([*ARCHIVES, *REPOSITORIES, "demo", "auto"])
    raise CheckpointError(
        f"model {http.redact(model)!r} is neither one of {names}, nor a directory, a Hugging Face repository id "
        "or an https URL; set KIMI_VL_MODEL to one of these"
    )


def thinks(model: str, folder: Path) -> bool:
    """Whether the checkpoint in ``folder``, asked for as ``model``, writes thinking before its answer.

    ``KIMI_VL_THINKING`` (``on`` or ``off``) decides; then the first that is a published name or repository id of
    ``model``, the manifest's model, the repository of the Hub cache that ``folder`` is in, and ``_name_or_path`` in
    ``config.json``. A checkpoint that none of these names thinks. What a folder of one's own is called says nothing.
    """
    setting = os.environ.get("KIMI_VL_THINKING", "")
    if setting not in ("", "on", "off"):
        raise CheckpointError(f"KIMI_VL_THINKING={setting}: must be 'on' or 'off', or not be set")
    if setting:
        return setting == "on"
    manifest = _manifest(model)
    asked = "" if Path(model).is_dir() else model
    for name in (asked, manifest.model if manifest else "", huggingface.repository_of(folder), _origin(folder)):
        known = _THINKS.get(name.partition("@")[0].lower())
        if known is not None:
            return known
    return True


def _origin(folder: Path) -> str:
    """``_name_or_path`` of the checkpoint's ``config.json``, or an empty string."""
    try:
        name = json.loads((folder / "config.json").read_bytes()).get("_name_or_path")
    except (OSError, ValueError, AttributeError):
        return ""
    return name if isinstance(name, str) else ""


# Names


def _is_url(model: str) -> bool:
    try:
        parts = urlsplit(model)
    except ValueError:
        return False
    return parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in ("127.0.0.1", "localhost", "::1"))


def _below(base: str, name: str) -> str:
    """The URL of ``name`` below ``base``, whose query stays, since it may have the signature."""
    try:
        parts = urlsplit(base)
    except ValueError:
        parts = urlsplit("")
    if parts.scheme not in ("https", "http"):
        raise CheckpointError(f"KIMI_VL_WEIGHTS_URL={http.shown(base)}: must begin with https:// or http://")
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}"))


def _name_of(url: str) -> str:
    """The name of an archive in the cache: its file name and a hash of its URL, since servers may share file names."""
    parts = urlsplit(url)
    name = parts.path.rpartition("/")[2].removesuffix(".tar")
    if not re.fullmatch(r"\w[\w.+%=-]*", name) or _RESERVED.search(name):
        raise CheckpointError(f"{http.shown(url)}: the address of a model must end in NAME.tar")
    return f"{name}-{hashlib.sha256(http.shown(url).encode()).hexdigest()[:8]}"


def _manifest(model: str) -> Manifest | None:
    named = os.environ.get("KIMI_VL_MANIFEST")
    if named:
        return Manifest.read(Path(named))
    ours = MANIFESTS / f"{model}.json"
    return Manifest.read(ours) if model in (*ARCHIVES, *REPOSITORIES) and ours.exists() else None


def _always() -> bool:
    """Whether KIMI_VL_VERIFY asks to verify at every start."""
    value = os.environ.get("KIMI_VL_VERIFY", "")
    if value not in ("", "always"):
        raise CheckpointError(f"KIMI_VL_VERIFY={value}: must be 'always', which hashes at every start, or not be set")
    return value == "always"


# The three sources of a model


def _from_directory(root: Path, cache: Path, manifest: Manifest | None) -> Path:
    try:
        folder = verify.checkpoint_folder(root)
        if manifest is None and not verify.is_snapshot(folder):
            verify.check(folder)
            return folder
        place = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]
        marker = cache / f"local-{place}.verified"
        if not _is_warm(marker, folder, manifest):
            _mark(marker, folder, manifest, verify.check(folder, manifest))
        return folder
    except CheckpointError as error:
        raise CheckpointError(f"{error}; replace what is named, or set KIMI_VL_MODEL to another model") from None


def _from_archive(url: str, name: str, cache: Path, manifest: Manifest | None) -> Path:
    final, marker = cache / name, cache / f"{name}.verified"
    if folder := _warm_entry(final, marker, manifest):
        return folder
    with _locked(cache, name, final) as writable:
        if folder := _warm_entry(final, marker, manifest):  # another process has fetched it meanwhile
            return folder
        if writable:
            for leftover in cache.iterdir():
                if leftover.name.startswith((f"{name}.part-", f"{marker.name}.part-")):  # of a process that was killed
                    download.remove(leftover) if leftover.is_dir() else leftover.unlink()
        if final.is_dir():
            try:
                folder = verify.checkpoint_folder(final)
                stamps = verify.check(folder, manifest, inside=final)
            except CheckpointError as error:
                if not writable:
                    raise CheckpointError(f"{error}; the cache is read-only, so mount a complete one") from None
                log.warning("%s; removing this copy and fetching it again", error)
                marker.unlink(missing_ok=True)
                download.remove(final)
            else:
                _mark(marker, folder, manifest, stamps)
                return folder
        stamps = _fetch(url, name, final, manifest)
        folder = verify.checkpoint_folder(final)
        _mark(marker, folder, manifest, stamps)
        return folder


def _fetch(url: str, name: str, final: Path, manifest: Manifest | None) -> verify.Stamps:
    """Fetch the archive at ``url`` to ``final``, which is either complete and verified or not there."""
    address = http.shown(url)
    for last in (False, True):
        private = Path(tempfile.mkdtemp(prefix=f"{name}.part-", dir=final.parent))
        try:
            tree = download.fetch(url, private)
            try:
                stamps = verify.check(verify.checkpoint_folder(tree), manifest, inside=tree)
            except CheckpointError as error:
                # the path in the message would be that of the copy, which is deleted
                reason = str(error).replace(f"{tree}/", f"{address}: ").replace(str(tree), address)
                if last or not isinstance(error, DamagedError):
                    raise CheckpointError(f"{reason}; the archive cannot be used, make or upload it anew") from None
                log.warning("%s; fetching it once more", reason)
                continue
            _sync(tree)
            tree.rename(final)
            _sync_folder(final.parent)
            return stamps
        finally:
            download.remove(private)
    raise AssertionError("both tries return or raise")


def _from_hub(repository: str, cache: Path, manifest: Manifest | None) -> Path:
    name, _, revision = repository.partition("@")
    tree = huggingface.tree_of(cache, name)
    marker = cache / f"{tree.name}{'@' if revision else ''}{revision.replace('/', '--')}.verified"
    folder = huggingface.snapshot(tree, revision)
    if folder and _is_warm(marker, folder, manifest):
        return folder
    with _locked(cache, tree.name, folder) as writable:
        folder = huggingface.snapshot(tree, revision)
        if folder and _is_warm(marker, folder, manifest):
            return folder
        for tries_left in (2, 1, 0):
            if folder:
                try:
                    stamps = verify.check(folder, manifest)
                    _mark(marker, folder, manifest, stamps)
                    return folder
                except CheckpointError as error:
                    if not writable:
                        raise CheckpointError(f"{error}; the cache is read-only, so mount a complete one") from None
                    if not tries_left:
                        raise CheckpointError(f"{error}; the copy on the Hub cannot be used, name another") from None
                    log.warning("%s; fetching it again", error)
                    marker.unlink(missing_ok=True)
                    damaged = error.files if isinstance(error, DamagedError) else []
                    huggingface.discard(folder, damaged, keep_files=tries_left == 2)
            folder = huggingface.fetch(name, revision, cache)
    raise AssertionError("the last try returns or raises")


# The cache


def _warm_entry(final: Path, marker: Path, manifest: Manifest | None) -> Path | None:
    try:
        folder = verify.checkpoint_folder(final)
    except CheckpointError:
        return None
    return folder if _is_warm(marker, folder, manifest) else None


def _is_warm(marker: Path, folder: Path, manifest: Manifest | None) -> bool:
    if _always() or not verify.is_marked(marker, folder, manifest):
        return False
    log.info("%s: unchanged since it was verified", folder)
    return True


def _mark(marker: Path, folder: Path, manifest: Manifest | None, stamps: verify.Stamps) -> None:
    try:
        marker.parent.mkdir(parents=True, exist_ok=True)
        verify.mark(marker, folder, manifest, stamps)
    except OSError as error:
        log.info("%s: cannot be marked as verified (%s), so every start verifies it", folder, error.strerror)


@contextmanager
def _locked(cache: Path, name: str, entry: Path | None) -> Iterator[bool]:
    """A lock so that one process at a time works on ``name``. Yields whether the cache can be written; raises where it
    must be and cannot."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        if not os.access(cache, os.W_OK):
            raise PermissionError(errno.EACCES, "Permission denied")
        handle = (cache / f"{name}.lock").open("a")
    except OSError as error:
        if entry is None or not entry.is_dir():
            raise CheckpointError(
                f"{cache}: does not hold {name} and cannot be written ({error.strerror}); make it writable, "
                "or mount one that is complete"
            ) from None
        yield False
        return
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("another start is at work on %s: waiting for it", name)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield True


def _sync(root: Path) -> None:
    for folder, _, names in os.walk(root):
        for path in [os.path.join(folder, name) for name in names] + [folder]:
            if not os.path.islink(path):
                _sync_folder(Path(path))


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
