"""Compiles the C++ of this folder with the system's compiler on first use, and keeps the library for later starts.

The library is in ``$XDG_CACHE_HOME/kimi-vl/kernels`` (``~/.cache`` without that variable), named by its sources, flags
and compiler. It ends with the hash of itself, so that a damaged one is never loaded, and is moved into place when it is
complete, so that processes may compile at the same time.

It is loaded after torch and is linked to OpenMP's runtime by the name of the one that torch has loaded: kernels and
torch share one pool of threads, which belongs to the calling thread.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Collection
from pathlib import Path

import torch  # noqa: F401 - its OpenMP runtime has to be loaded first

# What a processor needs, as Linux names it, and the compiler's flag for it. Not -march=native: a cache may be shared by
# machines, and a flag more is another library.
NEEDED = {
    "avx512f": "-mavx512f",
    "avx512bw": "-mavx512bw",
    "avx512vl": "-mavx512vl",
    "avx512dq": "-mavx512dq",
    "avx512_vnni": "-mavx512vnni",
    "fma": "-mfma",
    "f16c": "-mf16c",
}
OPTIONAL = {"avx512_bf16": "-mavx512bf16"}
FLAGS = ("-std=c++17", "-O2", "-fPIC", "-shared", "-fopenmp", "-ffp-contract=off")
COMPILE_S = 300.0
_SOURCES = Path(__file__).parent
_DIGEST = hashlib.sha256().digest_size

_loading = threading.Lock()


class Unavailable(Exception):
    """Why there are no native kernels here, in words for the log."""


def library() -> ctypes.CDLL:
    """The kernels, compiled if need be. Raises :class:`Unavailable` where this machine cannot have them."""
    with _loading:  # a cached function may run twice at a time
        found = _library()
    if isinstance(found, Unavailable):
        raise found
    return found


@functools.cache
def _library() -> ctypes.CDLL | Unavailable:
    try:
        return build(processor_features(), cache_folder())
    except Unavailable as reason:
        return reason


def cache_folder() -> Path:
    """Raises :class:`Unavailable` where the user has no home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kimi-vl" / "kernels"
    except RuntimeError:
        raise Unavailable("there is no home folder to keep them in; set XDG_CACHE_HOME") from None


def processor_features(path: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """Those of an x86-64 processor under Linux; none of another machine."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), ()))


def build(features: Collection[str], folder: Path, sources: Path = _SOURCES) -> ctypes.CDLL:
    """The library of the C++ files in ``sources``, from ``folder`` or compiled into it.

    Raises :class:`Unavailable` as :func:`needed` does, and where compiling fails.
    """
    command = [*needed(features), *FLAGS, *NEEDED.values()]
    command += [flag for name, flag in OPTIONAL.items() if name in features]
    files = sorted(path for path in sources.iterdir() if path.suffix in (".cpp", ".h"))
    target = folder / f"{_key(command, files)}.so"
    if (found := _load(target)) is not None:
        return found
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=folder, prefix="compiling-") as scratch:
            made = Path(scratch) / target.name
            _run([*command, "-o", str(made), *(str(path) for path in files if path.suffix == ".cpp")], COMPILE_S)
            with made.open("r+b") as file:
                digest = hashlib.sha256(file.read()).digest()
                file.write(digest)  # after what the loader reads
            os.replace(made, target)
    except OSError as error:
        raise Unavailable(f"they cannot be kept in {folder} ({error.strerror})") from None
    if (found := _load(target)) is None:
        raise Unavailable("what the compiler made cannot be loaded")
    return found


def needed(features: Collection[str]) -> list[str]:
    """The compiler's command. Raises :class:`Unavailable` where the processor lacks a feature, or as
    :func:`compiler`."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise Unavailable("they are for Linux on x86-64")
    if missing := [name for name in NEEDED if name not in features]:
        raise Unavailable(f"the processor lacks {', '.join(missing)}")
    return compiler()


def compiler() -> list[str]:
    """The command of the variable CXX, else g++ or c++. Raises :class:`Unavailable` where there is none, or only clang,
    whose OpenMP is another one than torch's."""
    asked = shlex.split(os.environ.get("CXX", ""))
    for command in [asked] if asked else [["g++"], ["c++"]]:
        if shutil.which(command[0]) and "clang" not in _version(tuple(command)):
            return command
    raise Unavailable("there is no g++; install it, or set CXX to one")


@functools.cache
def _version(command: tuple[str, ...]) -> str:
    return _run([*command, "--version"], 60)


def _key(command: list[str], files: list[Path]) -> str:
    parts = [
        _version((command[0],)),
        *command,
        *(part for path in files for part in (path.name, path.read_text(encoding="utf-8"))),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _run(command: list[str], seconds: float) -> str:
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=seconds
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{command[0]} does not run ({type(error).__name__})") from None
    if done.returncode:
        said = next((line for line in done.stderr.splitlines() if "error" in line), f"exit status {done.returncode}")
        raise Unavailable(f"{command[0]} fails: {said[:200]}")
    return done.stdout


def _load(path: Path) -> ctypes.CDLL | None:
    """None where there is no library at ``path``, or not the one that was written there."""
    try:
        content = path.read_bytes()
        if hashlib.sha256(content[:-_DIGEST]).digest() == content[-_DIGEST:]:
            return ctypes.CDLL(str(path))
    except OSError:
        pass
    return None
