"""Attention of prompts and images by a FlashAttention package, where one is installed that supports the tensors.

FlashAttention 4 (``flash_attn.cute``) is for compute capabilities 9 and 10 and takes values of fewer dims than keys.
FlashAttention 2 (``flash_attn``) is for 8.0 and later, and needs the values padded. Both are optional: without one,
:func:`usable` is false and the caller takes a kernel or torch. A package is compared with torch before its first use,
and never used if it fails.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .attention_metadata import PrefillChunk

# Shapes: N heads, S queries, L keys, D dims of queries and keys, V of values; R, P, Q as in `reference`.
_MAJORS = {"flash_attn.cute": (9, 10), "flash_attn": (8, 9, 10, 12)}
_refused: set[str] = set()

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Package:
    """The functions of one package. With ``narrow``, values may have fewer dims than keys; never more."""

    narrow: bool
    function: Callable[..., object]
    varlen: Callable[..., object]


def usable(states: Tensor) -> bool:
    """Whether a package can be imported and takes tensors of this dtype and device."""
    return states.is_cuda and states.dtype in (torch.bfloat16, torch.float16) and _package(states.device) is not None


def causal(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Causal attention (B, N, S, V) of queries (B, N, S, D), which belong to the last S of the keys (B, N, L, D)."""
    package = _package(query.device)
    assert package is not None
    return _causal(package, query, key, value, scale)


def mla_prefill(
    query: Tensor, rotated: Tensor, latents: Tensor, expanded: Tensor, chunk: PrefillChunk, scale: float
) -> Tensor:
    """See :func:`kimi_vl.kernels.reference.mla_prefill`."""
    heads = reference.heads_of(query, rotated, latents, expanded)
    query, key, value = (states.transpose(0, 1).unsqueeze(0) for states in heads)  # (1, N, S or L, D)
    return causal(query, key, value, scale)[0].transpose(0, 1)  # (S, N, V)


def packed(query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int]) -> Tensor:
    """Full attention inside each of the sequences packed in (T, N, D) tensors; ``lengths`` sum to T."""
    package = _package(query.device)
    assert package is not None
    return _packed(package, query, key, value, lengths)


def _causal(package: Package, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    dims = value.shape[-1]
    widest = max(query.shape[-1], dims)
    query, key = _padded(query, widest), _padded(key, widest)
    if not package.narrow:
        value = _padded(value, widest)
    query, key, value = (states.transpose(1, 2) for states in (query, key, value))
    heads = _output(package.function(query, key, value, softmax_scale=scale, causal=True))  # (B, S, N, V or D)
    return heads[..., :dims].transpose(1, 2)


def _padded(states: Tensor, dims: int) -> Tensor:
    return states if states.shape[-1] == dims else F.pad(states, (0, dims - states.shape[-1]))


def _packed(package: Package, query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int]) -> Tensor:
    ends, longest = _ends(tuple(lengths), query.device), max(lengths)
    return _output(
        package.varlen(
            query, key, value, cu_seqlens_q=ends, cu_seqlens_k=ends, max_seqlen_q=longest, max_seqlen_k=longest
        )
    )


def _output(result: object) -> Tensor:
    """FlashAttention 4 also returns the log-sum-exp."""
    output = result[0] if isinstance(result, tuple) else result
    assert isinstance(output, Tensor)
    return output


def candidates(device: torch.device) -> list[str]:
    """The modules that support a device, installed or not, in order of preference."""
    if device.type != "cuda":
        return []
    major, _ = torch.cuda.get_device_capability(device)
    return [name for name, majors in _MAJORS.items() if major in majors]


def refuse(name: str, reason: str) -> None:
    """Never use this module; the log gives the reason."""
    log.warning("%s is not used: %s", name, reason)
    _refused.add(name)
    _package.cache_clear()


@torch.inference_mode()
def reason_against(name: str, device: torch.device) -> str:
    """Why a module cannot be used on a device, or "", also where it is not installed.

    Both functions are compared with torch at head dims of the published model, within four roundings of bfloat16: two
    of each side.
    """
    package = _imported(name)
    if package is None:
        return ""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)

    try:
        query, key, value = normal(1, 2, 5, 192), normal(1, 2, 70, 192), normal(1, 2, 70, 128)
        mask = torch.ones(5, 70, dtype=torch.bool, device=device).tril(65)
        text = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.1)
        pairs = [(_causal(package, query, key, value, 0.1), text)]
        query, key, value = normal(3, 40, 2, 72)
        parts = zip(*(states.transpose(0, 1).split([28, 12], 1) for states in (query, key, value)), strict=True)
        images = [F.scaled_dot_product_attention(*(part[None] for part in own))[0] for own in parts]  # (N, P_i, D)
        pairs.append((_packed(package, query, key, value, [28, 12]), torch.cat(images, 1).transpose(0, 1)))
        away = max(float((found.float() - right.float()).norm() / right.float().norm()) for found, right in pairs)
    except Exception as error:
        return f"it fails ({type(error).__name__})"
    return "" if away <= 4 * 2.0**-8 else f"its result is off by {away:.1e} of the norm"


@functools.cache
def _package(device: torch.device) -> Package | None:
    """The first installed package that supports the device and agrees with torch on it."""
    for name in candidates(device):
        package = None if name in _refused else _imported(name)
        reason = reason_against(name, device) if package else ""
        if reason:
            log.warning("%s is not used: %s", name, reason)
        elif package:
            log.info("attention over long inputs by %s", name)
            return package
    return None


def _imported(name: str) -> Package | None:
    try:
        found = importlib.import_module(name)
        return Package(name == "flash_attn.cute", found.flash_attn_func, found.flash_attn_varlen_func)
    except (ImportError, AttributeError):  # or it was built for another torch
        return None


@functools.lru_cache(maxsize=16)
def _ends(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Cumulative lengths (n + 1) for all layers of a pass, copied to the device once."""
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
