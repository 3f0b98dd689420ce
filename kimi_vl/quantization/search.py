"""Floating-point matrices to small numbers, and the scales with which these are closest to what they were.

Symmetric, of weights alone: what is computed with them stays floating-point. Knows no files.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import CheckpointError
from .scheme import Scheme
from .weight import FLOAT8, QuantizedWeight, pack

SCALES = torch.bfloat16  # of the weights that are quantised here
# Values that are quantised at a time. On a CPU few enough that they stay in a core's own cache and that torch takes one
# thread for them; callers have a thread for each matrix.
_BLOCKS = {"cpu": 1 << 15}
_BLOCK = 1 << 22
_STEPS = (7.0, 7.5, 8.0, 8.5, 9.0, 9.5, 10.0, 11.0)
"""Into how many steps the largest value of an int4 group is tried to be cut. Past 8 it is clipped, and others are
closer."""
_SMALLEST = 2.0**-126  # the least magnitude of a scale: a normal number


def quantize(weight: Tensor, scheme: Scheme, name: str = "the weight") -> tuple[Tensor, Tensor]:
    """Codes (O, I * bits / 8), uint8 or float8, and scales (O, G), bfloat16, of ``weight`` (O, I) in any floating-point
    type.

    With 8 bits a scale is the largest magnitude by the largest number there is. With 4 it is the one of the least
    squared error among some fractions of that, and the sign of a scale lets the largest value be the lowest integer, of
    which there is one more than of positive ones. Raises :class:`CheckpointError` naming the weight where a value is
    not finite or groups do not fit its width.
    """
    outputs, inputs = weight.shape
    group = scheme.group or inputs
    check_width(inputs, scheme, name)
    kind = FLOAT8 if scheme.floating else torch.uint8
    codes = torch.empty(outputs, inputs * scheme.bits // 8, dtype=kind, device=weight.device)
    scales = torch.empty(outputs, inputs // group, dtype=SCALES, device=weight.device)
    rows = max(1, _BLOCKS.get(weight.device.type, _BLOCK) // inputs)
    for begin in range(0, outputs, rows):
        groups = weight[begin : begin + rows].float().unflatten(1, (-1, group))  # (o, G, I / G)
        if not bool(groups.isfinite().all()):
            raise CheckpointError(f"tensor {name} has a value that is not finite")
        if scheme.floating:
            numbers, found = _as_float8(groups)
            packed = numbers.flatten(1)
        else:
            numbers, found = _searched(groups) if scheme.bits == 4 else _rounded(groups, 127.0, scheme.bits)
            packed = pack(numbers.flatten(1), scheme.bits)
        codes[begin : begin + rows], scales[begin : begin + rows] = packed, found
    return codes, scales


def check_width(inputs: int, scheme: Scheme, name: str) -> None:
    """Raises :class:`CheckpointError` where the groups of ``scheme`` do not fit ``inputs``."""
    if scheme.group and scheme.rows == 1 and inputs % scheme.group:
        raise CheckpointError(
            f"tensor {name} has {inputs} inputs, which are no groups of {scheme.group}; choose another group or form"
        )
    if scheme.packed and inputs * scheme.bits % 32:
        raise CheckpointError(f"tensor {name} has {inputs} inputs, which do not fill whole words of 32 bits")


def _rounded(groups: Tensor, steps: float, bits: int) -> tuple[Tensor, Tensor]:
    scales = _as_stored(groups.abs().amax(-1) / steps)
    return _integers(groups, scales, bits), scales


def _as_float8(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Past the largest number a conversion gives NaN, where rounding a scale would take some values."""
    largest = torch.finfo(FLOAT8).max
    scales = _as_stored(groups.abs().amax(-1) / largest)
    return (groups / scales.float().unsqueeze(-1)).clamp_(-largest, largest).to(FLOAT8), scales


def _searched(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Integers and scales of 4 bits with the least squared error that is found."""
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)).squeeze(-1)  # (o, G), with its sign
    best = _as_stored(-largest / _STEPS[0])
    least = _squared_error(groups, best)
    for steps in _STEPS[1:]:
        best, least = _better(groups, best, least, _as_stored(-largest / steps))
    integers = _integers(groups, best, 4).float()  # for these the best scale is a quotient
    fitted = (groups * integers).sum(-1) / integers.square().sum(-1).clamp(min=1)
    best, _ = _better(groups, best, least, _as_stored(fitted))
    return _integers(groups, best, 4), best


def _better(groups: Tensor, best: Tensor, least: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    error = _squared_error(groups, scales)
    return torch.where(error < least, scales, best), torch.minimum(error, least)


def _squared_error(groups: Tensor, scales: Tensor) -> Tensor:
    return (_integers(groups, scales, 4) * scales.float().unsqueeze(-1) - groups).square_().sum(-1)


def _integers(groups: Tensor, scales: Tensor, bits: int) -> Tensor:
    limit = 1 << bits - 1
    return (groups / scales.float().unsqueeze(-1)).round_().clamp_(-limit, limit - 1)


def _as_stored(scales: Tensor) -> Tensor:
    """Rounded to what is stored; never 0, not even for a group of zeros."""
    small = scales.abs() < _SMALLEST
    return torch.where(small, torch.full_like(scales, _SMALLEST), scales).to(SCALES)


def quantized(weight: Tensor, scheme: Scheme, name: str = "the weight") -> QuantizedWeight:
    """:func:`quantize` as a weight to compute with."""
    return QuantizedWeight(*quantize(weight, scheme, name), scheme.bits)
