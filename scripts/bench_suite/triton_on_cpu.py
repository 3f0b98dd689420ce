"""Triton's interpreter, made to compute what a GPU computes. Import this before any kernel.

Four things of the interpreter (Triton 3.6) are put right: its handling of scalars, which NumPy 2.4 refuses; casts to
bfloat16, which it cuts off where a GPU rounds to the nearest; casts from float8, of which it takes NaN for a number;
and tl.dot of bfloat16, whose bits it takes for integers. It learns to refuse addresses outside the launch's arguments,
where a GPU would use other values or end the process. And two things are made quick: it prepares the language anew for
each call of a function within a kernel, and looks at every integer operation for an overflow that it reports only when
debugging.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import dataclasses
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

if not isinstance(tl.cdiv, interpreter.InterpretedFunction):
    raise RuntimeError("triton was imported before TRITON_INTERPRET=1 was set; set it before")

_patch_lang_tensor = interpreter._patch_lang_tensor
_convert_float = interpreter._convert_float
_create_dot = interpreter.InterpreterBuilder.create_dot
_masked_load = interpreter.InterpreterBuilder.create_masked_load
_masked_store = interpreter.InterpreterBuilder.create_masked_store
_init_arguments = interpreter.GridExecutor._init_args_hst


def _scalars(tensor: Any, scope: Any) -> None:
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def _to_float32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def _convert(values: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
    if (source, target) == (tl.bfloat16, tl.float32):
        return _to_float32(values).view(np.uint32)
    if (source, target) == (tl.float32, tl.bfloat16):
        return _to_bfloat16(values)
    converted = _convert_float(values, source, target, rounding)
    if (source, target) == (tl.float8e4nv, tl.float32):
        converted = np.where(values & 0x7F == 0x7F, np.float32(np.nan).view(np.uint32), converted)
    return converted


def _dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
    if a.dtype.scalar == tl.bfloat16:
        a, b = (interpreter.TensorHandle(_to_float32(each.data), tl.float32) for each in (a, b))
    return _create_dot(self, a, b, *rest)


_extents: list[tuple[int, int]] = []  # of the arguments of the running launch


def _take_arguments(self: Any, arguments: Any, named: Any) -> Any:
    taken = _init_arguments(self, arguments, named)
    _extents.clear()
    for value in (*taken[0], *taken[1].values()):
        if isinstance(value, torch.Tensor) and value.numel():
            last = sum((count - 1) * stride for count, stride in zip(value.shape, value.stride(), strict=True))
            _extents.append((value.data_ptr(), value.data_ptr() + (last + 1) * value.element_size()))
    return taken


def _check(what: str, pointers: Any, mask: Any) -> None:
    # a mask may come as integers, which would be taken for places
    addresses = pointers.data[np.broadcast_to(mask.data.astype(bool), pointers.data.shape)]
    if addresses.size:
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        low, high = int(addresses.min()), int(addresses.max()) + size
        if not any(begin <= low and high <= end for begin, end in _extents):
            raise IndexError(f"a kernel {what} out of bounds")


def _load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
    _check("reads", pointers, mask)
    return _masked_load(self, pointers, mask, *rest)


def _store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
    _check("writes", pointers, mask)
    return _masked_store(self, pointers, value, mask, *rest)


_prepared: set[int] = set()


def _call(self: Any, *arguments: Any, **named: Any) -> Any:
    module = id(self.fn.__globals__)
    if module not in _prepared:
        interpreter._patch_lang(self.fn)
        _prepared.add(module)
    return self.rewrite()(*arguments, **named)


interpreter._patch_lang_tensor = _scalars
interpreter._convert_float = _convert
interpreter.InterpreterBuilder.create_dot = _dot  # pyright: ignore[reportAttributeAccessIssue]
interpreter.InterpretedFunction.__call__ = _call
interpreter.GridExecutor._init_args_hst = _take_arguments  # pyright: ignore[reportAttributeAccessIssue]
interpreter.InterpreterBuilder.create_masked_load = _load  # pyright: ignore[reportAttributeAccessIssue]
interpreter.InterpreterBuilder.create_masked_store = _store  # pyright: ignore[reportAttributeAccessIssue]
interpreter.interpreter_builder.options = dataclasses.replace(
    interpreter.interpreter_builder.options, sanitize_overflow=False
)
