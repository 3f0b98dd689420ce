"""Where a GPU differs from a CPU for the engine: the current device, copies that do not synchronise, and errors that
stay."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation
# CUDA errors after which the device goes on, since nothing began: besides that one an invalid value or configuration of
# a launch, no kernel for this architecture, and more registers or shared memory than there are.
_REFUSED = {OUT_OF_MEMORY, 1, 9, 209, 701}


def current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes a GPU the current one of this thread, for kernels, events and streams that name none."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def staged(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers as a tensor of the host that can be copied to ``device`` without waiting for what that is doing.

    torch keeps pinned memory until the copies out of it are over, and uses it again after that.
    """
    made = torch.tensor(values, dtype=dtype)
    return torch.empty(made.shape, dtype=dtype, pin_memory=True).copy_(made) if device.type == "cuda" else made


def tensor(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers as a tensor on ``device``. Does not synchronise."""
    return staged(values, dtype, device).to(device, non_blocking=True)


def has_float8(device: torch.device) -> bool:
    """Whether it is a GPU that converts float8 itself: of compute capability 8.9 or later."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def give_back_unused_memory(device: torch.device) -> None:
    """What torch's allocator holds and nobody uses goes back to the device, where larger pieces can be had of it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def lost(device: torch.device, error: BaseException) -> bool:
    """Whether ``device`` is of no more use after ``error``, as after an illegal access to memory.

    Such an error stays: CUDA answers every later call with it, also one that only waits. The call that raises it first
    need not be the one at fault.
    """
    if isinstance(error, torch.AcceleratorError) and getattr(error, "error_code", None) not in _REFUSED:
        return True
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except Exception:
        return True
    return False
