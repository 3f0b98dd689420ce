"""The decoder's operations behind one table: plain PyTorch everywhere, Triton on a GPU where it is asked for.

Triton is imported only when it is chosen; nothing else of the package knows it. Kernels name the integers that differ
from step to step as ``do_not_specialize``: Triton compiles a kernel once more for an integer that is 1 and for one that
16 divides, which would happen while requests are served.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import plain, reference, strips
from .strips import Experts, Strips, mlp, project

__all__ = ["REFERENCE", "TORCH", "VARIABLE", "Experts", "Ops", "choose", "mlp", "project"]

VARIABLE = "KIMI_VL_KERNELS"


@dataclass(frozen=True)
class Ops:
    """One implementation of every operation; :mod:`kimi_vl.kernels.reference` says what each computes.

    ``static`` ones never make the host wait, and leave tokens without a slot unwritten: what steps over buffers that
    stay (:mod:`kimi_vl.graphs`) need. ``lay_out`` makes of weights what may be taken in their place: by products, and
    by ``moe``, ``mla_prepare`` and ``mla_decode`` of the same table as their ``laid_out``.
    """

    name: str
    static: bool
    add_rms_norm: Callable[[Tensor, Tensor | None, Tensor, float], tuple[Tensor, Tensor]]
    norm_router: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    moe: Callable[..., Tensor]
    mla_prepare: Callable[..., tuple[Tensor, Tensor]]
    mla_decode: Callable[..., Tensor]
    lay_out: Callable[[Sequence[Tensor], Sequence[Experts]], dict[Tensor, Strips]] = lambda weights, experts: {}


REFERENCE = Ops(
    "reference",
    True,
    reference.add_rms_norm,
    reference.norm_router,
    reference.moe,
    reference.mla_prepare,
    reference.mla_decode,
)
TORCH = Ops(
    "torch",
    False,
    reference.add_rms_norm,
    reference.norm_router,
    plain.moe,
    plain.mla_prepare,
    plain.mla_decode,
    strips.lay_out,
)


def choose(device: torch.device | str, name: str | None = None) -> Ops:
    """The operations for a device: those called ``name``, else what the variable KIMI_VL_KERNELS names, else "torch".

    Raises ValueError for an unknown name, and RuntimeError where Triton is asked for and cannot be had.
    """
    device = torch.device(device)
    asked = name or os.environ.get(VARIABLE) or "torch"
    if asked == "torch":
        return TORCH
    if asked != "triton":
        raise ValueError(f"kernels are 'torch' or 'triton', not {asked!r}; change {VARIABLE}")
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            f"Triton's kernels run on an NVIDIA GPU, not on {device.type}; ask for 'torch' there, or unset {VARIABLE}"
        )
    try:
        from . import triton_mla, triton_moe, triton_norm, triton_router
    except ImportError as error:
        raise RuntimeError(
            f"Triton's kernels were asked for and cannot be imported ({error}); install triton, or unset {VARIABLE}"
        ) from error
    return Ops(
        "triton",
        True,
        triton_norm.add_rms_norm,
        triton_router.norm_router,
        triton_moe.moe,
        triton_mla.mla_prepare,
        triton_mla.mla_decode,
    )
