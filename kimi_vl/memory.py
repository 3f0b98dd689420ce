"""Memory for weights: in pages of 2 MB where the system has them, which are read a tenth faster. Knows no model."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor that is not filled."""
    values = torch.empty(shape, dtype=dtype, device=device)
    if device.type == "cpu":
        _use_huge_pages(values)
    return values


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
