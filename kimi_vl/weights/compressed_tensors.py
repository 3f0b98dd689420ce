"""The tensors of a checkpoint in compressed-tensors' form: what each weight has, and what it becomes.

Knows no files, and not where a weight goes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..quantization.scheme import Scheme
from ..quantization.weight import pack, unpack
from .shards import Expected


def stored_tensors(name: str, shape: tuple[int, ...], scheme: Scheme) -> dict[str, Expected]:
    """What the files have of the weight ``name`` of a ``shape`` (O, I)."""
    outputs, inputs = shape
    scales = (1,) if not scheme.rows and not scheme.group else scheme.scales(outputs, inputs)
    found = {f"{name}_scale": Expected(scales)}
    if scheme.packed:
        words = Expected((outputs, inputs * scheme.bits // 32), ("I32",), "I32")
        return found | {f"{name}_packed": words, f"{name}_shape": Expected((2,), ("I64", "I32"), "I64")}
    kind = "F8_E4M3" if scheme.floating else "I8"
    return found | {name: Expected((outputs, inputs), (kind,), kind)}


def as_stored(codes: Tensor, scales: Tensor, name: str, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """The tensors, packed, of a weight of a ``shape`` (O, I) with ``codes`` and ``scales``."""
    return {
        f"{name}_packed": codes.view(torch.int32),
        f"{name}_scale": scales,
        f"{name}_shape": torch.tensor(shape, dtype=torch.int64),
    }


def check_values(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...], scheme: Scheme) -> None:
    """Raises :class:`CheckpointError` where a scale cannot be one, or the stored shape is another than ``shape``."""
    scales = tensors[f"{name}_scale"]
    if not bool((scales.isfinite() & (scales != 0)).all()):
        raise CheckpointError(f"tensor {name}_scale has a scale that is zero or not finite")
    if scheme.packed and tuple(tensors[f"{name}_shape"].tolist()) != shape:
        said = tuple(tensors[f"{name}_shape"].tolist())
        raise CheckpointError(f"tensor {name}_shape says {said}; {shape} was expected")


def codes_and_scales(tensors: Mapping[str, Tensor], name: str, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """What a :class:`QuantizedWeight` is made of, from the tensors of a weight."""
    scales = tensors[f"{name}_scale"]
    if scheme.packed:
        return tensors[f"{name}_packed"].view(torch.uint8), scales
    return pack(tensors[name], scheme.bits), scales


def dequantized(tensors: Mapping[str, Tensor], name: str, scheme: Scheme) -> Tensor:
    """The weight (O, I), float32, from its tensors."""
    if scheme.packed:
        values = unpack(tensors[f"{name}_packed"].view(torch.uint8), scheme.bits)
    else:
        values = tensors[name]
    outputs, inputs = values.shape
    scales = tensors[f"{name}_scale"].float().view(scheme.scales(outputs, inputs))
    scales = scales.repeat_interleave(scheme.rows or outputs, 0)[:outputs]
    return values.float() * scales.repeat_interleave(scheme.group or inputs, 1)[:, :inputs]
