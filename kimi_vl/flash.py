"""Attention over long inputs by the flash_attn package, where it is installed and takes the tensors.

Nothing depends on it: who finds it not :func:`usable` asks torch.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

# Shapes: N heads, S queries, L keys, D dims of queries and keys, V of values.


@functools.cache
def _package() -> ModuleType | None:
    try:
        import flash_attn  # pyright: ignore[reportMissingImports]
    except ImportError:  # also one that was built for another torch
        return None
    return flash_attn


def usable(states: Tensor) -> bool:
    """Whether the package can be imported and takes tensors of this dtype and device."""
    return states.is_cuda and states.dtype in (torch.bfloat16, torch.float16) and _package() is not None


def causal(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Heads (B, N, S, V) of queries (B, N, S, D), which are the last S of the keys (B, N, L, D)."""
    package, dims = _package(), value.shape[-1]
    assert package is not None
    # one head dim for all is what it knows
    value = F.pad(value, (0, query.shape[-1] - dims))
    query, key, value = (states.transpose(1, 2) for states in (query, key, value))
    heads = package.flash_attn_func(query, key, value, softmax_scale=scale, causal=True)  # (B, S, N, D)
    return heads[..., :dims].transpose(1, 2)


def packed(query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int]) -> Tensor:
    """Full attention inside each of the sequences packed in (T, N, D) tensors; ``lengths`` sum to T."""
    package = _package()
    assert package is not None
    ends, longest = _ends(tuple(lengths), query.device), max(lengths)
    return package.flash_attn_varlen_func(query, key, value, ends, ends, longest, longest)


@functools.lru_cache(maxsize=16)
def _ends(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """The same for all layers, so it goes to the device once."""
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
