"""GEMMs of states with weights that are laid out as the checkpoint has them, packed beside that, or quantised."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from ..quantization.weight import QuantizedWeight, Weight, dense
from .packed_weights import PackedWeight

NOT_PACKED: Mapping[Tensor, PackedWeight] = MappingProxyType({})
_DEQUANTIZED = 1 << 22  # values of a quantised weight that are floating-point at a time


def project(states: Tensor, weight: Weight, packed: Mapping[Tensor, PackedWeight] = NOT_PACKED) -> Tensor:
    """``states @ weight.T``: (…, I) and (O, I) to (…, O).

    In bfloat16 on a CPU it is computed as W·xᵀ, which oneDNN does about 1.4 times as fast. One token is a GEMV, of the
    packed weight where ``states`` are (1, I) and ``packed`` has it. A quantised weight is dequantised for each use,
    some output channels at a time.
    """
    if isinstance(weight, QuantizedWeight):
        rows = max(1, _DEQUANTIZED // weight.shape[-1])
        parts = [
            project(states, weight[begin : begin + rows].dequantize(states.dtype))
            for begin in range(0, len(weight), rows)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
    found = packed.get(weight) if len(states) == 1 else None
    if found is not None:
        return found.gemv(states)
    if weight.dtype != torch.bfloat16 or weight.device.type != "cpu":
        return F.linear(states, weight)
    if states.numel() == states.shape[-1]:
        return torch.mv(weight, states.flatten()).view(*states.shape[:-1], -1)
    return (weight @ states.flatten(0, -2).t()).t().unflatten(0, states.shape[:-1])


def naive_project(states: Tensor, weight: Weight, packed: Mapping[Tensor, PackedWeight] = NOT_PACKED) -> Tensor:
    """What :func:`project` computes."""
    return states @ dense(weight, states.dtype).T


def mlp(
    states: Tensor,
    weights: tuple[Weight, Weight, Weight],
    packed: Mapping[Tensor, PackedWeight] = NOT_PACKED,
    project: Callable[..., Tensor] = project,
) -> Tensor:
    """down(silu(gate x) * up x) of ``states`` (T, H); ``weights`` are those of gate, up and down."""
    gate, up, down = weights
    inner = F.silu(project(states, gate, packed)) * project(states, up, packed)
    return project(inner, down, packed)
