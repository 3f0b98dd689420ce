"""The machine's memory: how much there is, and weights in pages of 2 MB where the system has them, which are read a
tenth faster. Knows no model."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import torch
from torch import Tensor


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor that is not filled."""
    values = torch.empty(shape, dtype=dtype, device=device)
    if device.type == "cpu":
        _use_huge_pages(values)
    return values


def total() -> int:
    """Bytes of the machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def available(root: Path = Path("/")) -> int:
    """Bytes that can still be had, within a container's limit; 0 where the system does not say (not Linux)."""
    try:
        lines = dict(line.split(":") for line in (root / "proc/meminfo").read_text().splitlines())
    except OSError:
        return 0
    free = int(lines["MemAvailable"].split()[0]) << 10
    group = root / "sys/fs/cgroup"
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:  # not in a container, or in one of the older kind
        return free
    return free if limit == "max" else max(0, min(free, int(limit) - int(used)))


def _use_huge_pages(values: Tensor) -> None:
    """Ask the system to back large values, still untouched, with pages of 2 MB."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    begin = -(-values.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (values.data_ptr() + values.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end - begin >= 2**21:
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        madvise(begin, end - begin, mmap.MADV_HUGEPAGE)  # advice: nothing is lost where it is not taken
