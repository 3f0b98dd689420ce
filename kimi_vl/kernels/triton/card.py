"""What the card allows that plans are chosen by. Knows no operation."""

from __future__ import annotations

import functools

import torch

_WIDE_SINCE = 200 << 10  # bytes of shared memory of a program: compute capabilities 9.0 and 10.0


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of it that one program may have."""
    # Triton's interpreter has none; 227 KB are an H100's
    if device.type != "cuda":
        return 227 << 10
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def is_wide(shared_memory: int) -> bool:
    """Whether a card with so many bytes for a program multiplies wide tiles from there (wgmma, tcgen05). On others
    registers do not hold their sums."""
    return shared_memory >= _WIDE_SINCE
