"""GEMMs of states with weights, in PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..quantization.weight import BLOCK, Weight, dense

_DEQUANTIZED = 1 << 22  # values of a weight that are made floating-point at a time


def project(states: Tensor, weight: Weight) -> Tensor:
    """``states @ weight.T``: (…, I) and (O, I) to (…, O).

    A weight that is no tensor is dequantised for each use, some output channels at a time.
    """
    if isinstance(weight, Tensor):
        return F.linear(states, weight)
    rows = max(1, _DEQUANTIZED // weight.shape[-1] // BLOCK) * BLOCK
    parts = [
        F.linear(states, weight[begin : begin + rows].dequantize(states.dtype)) for begin in range(0, len(weight), rows)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def naive_project(states: Tensor, weight: Weight) -> Tensor:
    """What :func:`project` computes."""
    return states @ dense(weight, states.dtype).T


def mlp(
    states: Tensor, weights: tuple[Weight, Weight, Weight], project: Callable[[Tensor, Weight], Tensor] = project
) -> Tensor:
    """down(silu(gate x) * up x) of ``states`` (T, H); ``weights`` are those of gate, up and down."""
    gate, up, down = weights
    return project(F.silu(project(states, gate)) * project(states, up), down)
