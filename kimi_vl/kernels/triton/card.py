"""What the card allows that plans are chosen by. Knows no operation."""

from __future__ import annotations

import functools

import torch

H100_SHARED_MEMORY = 227 << 10
"""Bytes of shared memory of a program, also where Triton interprets kernels, which has no card."""
_WIDE_SINCE = 200 << 10  # bytes of shared memory of a program: compute capabilities 9.0 and 10.0


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of it that one program may have."""
    return (
        torch.cuda.get_device_properties(device).shared_memory_per_block_optin
        if device.type == "cuda"
        else H100_SHARED_MEMORY
    )


@functools.cache
def multiprocessors(device: torch.device) -> int:
    # 132 are an H100's
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def is_wide(shared_memory: int) -> bool:
    """Whether a card with so many bytes for a program multiplies wide tiles from there (wgmma, tcgen05). On others
    registers do not hold their sums."""
    return shared_memory >= _WIDE_SINCE
