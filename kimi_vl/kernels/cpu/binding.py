"""Functions of the native library, looked up once."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import build

DTYPES = {torch.bfloat16: "bfloat16", torch.float32: "float32"}
_TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "n": ctypes.c_int, "f": ctypes.c_float}


@functools.cache
def function(name: str, arguments: str) -> Callable[..., None]:
    """``arguments`` has a letter for each: "p" a pointer or the address of a tensor, "i" an int64, "n" an int, "f" a
    float32."""
    library: Any = build.library()
    found = getattr(library, name)
    found.argtypes, found.restype = [_TYPES[letter] for letter in arguments], None
    return found


@functools.cache
def kernel(name: str, dtype: torch.dtype, arguments: str) -> Callable[..., None]:
    """The instance of the function template ``name`` for tensors of ``dtype``; arguments are those of
    :func:`function`."""
    address: Any = getattr(build.library(), f"{name}_{DTYPES[dtype]}")
    address.restype = ctypes.c_void_p
    return ctypes.CFUNCTYPE(None, *(_TYPES[letter] for letter in arguments))(address())


def takes(first: Tensor, *others: Tensor) -> bool:
    """Whether there are kernels for the dtype of ``first``, on its device, and the others have the same dtype."""
    if first.dtype not in DTYPES or first.device.type != "cpu":
        return False
    for other in others:  # noqa: SIM110 - all() takes as long as a small kernel
        if other.dtype != first.dtype:
            return False
    return True
