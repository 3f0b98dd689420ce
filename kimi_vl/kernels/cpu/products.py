"""GEMMs and experts in native code, over weights in blocks (:class:`BlockedWeight
<kimi_vl.quantization.weight.BlockedWeight>`).

Activations are bfloat16, and sums float32. A quantised weight is never dequantised: a vector is rounded to integers
instead, with 16 bits for weights of 8 bits, and for weights of 4 bits with 8 bits and a scale for 32 values. What
:func:`block` leaves as it is, and activations of another type, are computed in PyTorch. A vector's result has the same
bits alone and in any batch.
"""

from __future__ import annotations

import ctypes
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ...quantization.weight import BlockedWeight, Weight, fits, transpose
from .. import linear, plain, reference
from .binding import function

# Shapes as in `reference`.

_KINDS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}


class _Matrix(ctypes.Structure):
    """The struct of this name in products.cpp."""

    _fields_ = (
        ("values", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("outputs", ctypes.c_int32),
        ("inputs", ctypes.c_int32),
        ("bits", ctypes.c_int32),
        ("group", ctypes.c_int32),
        ("kind", ctypes.c_int32),
    )


_matrices: WeakKeyDictionary[BlockedWeight, ctypes._Pointer[_Matrix]] = WeakKeyDictionary()


@torch.no_grad()
def block(weight: Weight) -> Weight:
    """``weight`` in blocks, in its own memory, or ``weight`` itself where blocks have no place for it.

    The plain weight is not to be used after that.
    """
    if isinstance(weight, BlockedWeight) or weight.device.type != "cpu" or not fits(weight):
        return weight
    values = weight.data if isinstance(weight, Tensor) else weight.codes.data
    units = values.view(torch.int32)
    transpose_blocks = function("transpose_blocks", "pii")
    transpose_blocks(units.data_ptr(), units.numel() // units.shape[-1] // 16, units.shape[-1])
    if not isinstance(weight, Tensor):
        transpose(weight.scales.data)
    return BlockedWeight(weight)


def _matrix(weight: BlockedWeight) -> ctypes._Pointer[_Matrix]:
    """What native code knows ``weight`` by."""
    found = _matrices.get(weight)
    if found is None:
        (outputs, inputs), stored = weight.shape[-2:], weight.stored
        if isinstance(stored, Tensor):
            made = _Matrix(stored.data_ptr(), None, outputs, inputs, weight.bits, inputs, 0)
        else:
            codes, scales = stored.codes, stored.scales
            kind = _KINDS[scales.dtype]
            made = _Matrix(codes.data_ptr(), scales.data_ptr(), outputs, inputs, weight.bits, stored.group, kind)
        found = _matrices[weight] = ctypes.pointer(made)
    return found


def project(states: Tensor, weight: Weight) -> Tensor:
    """See :func:`kimi_vl.kernels.linear.project`."""
    if not isinstance(weight, BlockedWeight) or states.dtype != torch.bfloat16:
        return linear.project(states, weight)
    rows = states.reshape(-1, states.shape[-1])
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    result = states.new_empty(*states.shape[:-1], weight.shape[0])
    _product(weight, 1, rows, rows.stride(0), 0, len(rows), result)
    return result


def per_head(states: Tensor, weight: Weight) -> Tensor:
    """See :func:`kimi_vl.kernels.reference.per_head`."""
    if not isinstance(weight, BlockedWeight) or states.dtype != torch.bfloat16:
        return reference.per_head(states, weight)
    if states.stride(-1) != 1:
        states = states.contiguous()
    count, heads = states.shape[:2]
    result = states.new_empty(count, heads, weight.shape[1])
    _product(weight, heads, states, states.stride(0), states.stride(1), count, result)
    return result


def _product(
    weight: BlockedWeight, matrices: int, states: Tensor, stride: int, of_matrix: int, count: int, result: Tensor
) -> None:
    if count:
        function("project", "pnpiinp")(
            _matrix(weight), matrices, states.data_ptr(), stride, of_matrix, count, result.data_ptr()
        )


def moe(
    states: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up: Weight,
    down: Weight,
    shared: tuple[Weight, Weight, Weight] | None = None,
) -> Tensor:
    """See :func:`kimi_vl.kernels.reference.moe`. Routed and shared experts are one call where they have one format."""
    routed = _alike(gate_up, down)
    if routed is None or states.dtype != torch.bfloat16:
        return plain.moe(states, topk_ids, topk_weights, gate_up, down, shared)
    together = _alike(gate_up, *shared) if shared else None
    beside = (ctypes.POINTER(_Matrix) * 3)(*map(_matrix, together[1:])) if together else None
    result = torch.empty(states.shape, dtype=states.dtype)
    states, topk_ids, topk_weights = states.contiguous(), topk_ids.int().contiguous(), topk_weights.float().contiguous()
    if len(states):
        function("experts", "ppppnppnp")(
            *map(_matrix, routed), beside, states.data_ptr(), len(states),
            topk_ids.data_ptr(), topk_weights.data_ptr(), topk_ids.shape[1], result.data_ptr(),
        )  # fmt: skip
    return result if shared is None or together else result + linear.mlp(states, shared, project)


def _alike(*weights: Weight) -> list[BlockedWeight] | None:
    """``weights`` if all are in blocks, with the same bits."""
    blocked = [weight for weight in weights if isinstance(weight, BlockedWeight)]
    return blocked if len(blocked) == len(weights) and len({weight.bits for weight in blocked}) == 1 else None
