"""The tensors of a checkpoint in compressed-tensors' form: what each weight has, and what it becomes.

Knows no files, and not where a weight goes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..quantization.scheme import Scheme
from ..quantization.weight import FLOAT8, pack, unpack
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
    """The tensors of a weight of a ``shape`` (O, I) with ``codes``, which are packed integers or float8."""
    if codes.dtype == FLOAT8:
        return {name: codes, f"{name}_scale": scales}
    return {
        f"{name}_packed": codes.view(torch.int32),
        f"{name}_scale": scales,
        f"{name}_shape": torch.tensor(shape, dtype=torch.int64),
    }


def check_values(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...], scheme: Scheme) -> None:
    """Raises :class:`CheckpointError` naming the tensor with a value that cannot be one: of a scale, of the stored
    shape, which has to be ``shape``, or of a number that is not packed."""
    scales = tensors[f"{name}_scale"]
    largest = torch.finfo(FLOAT8).max if scheme.floating else 1 << scheme.bits - 1
    if not bool(((scales.float() * largest).isfinite() & (scales.float() != 0)).all()):
        raise CheckpointError(f"tensor {name}_scale has a scale that is zero, not finite or too large")
    if scheme.packed:
        said = tuple(tensors[f"{name}_shape"].tolist())
        if said != shape:
            raise CheckpointError(f"tensor {name}_shape says {said}; {shape} was expected")
    elif scheme.floating:
        if bool(((tensors[name].view(torch.uint8) & 0x7F) == 0x7F).any()):
            raise CheckpointError(f"tensor {name} has a value that is not finite")
    elif scheme.bits < 8 and not bool(((tensors[name] >= -largest) & (tensors[name] < largest)).all()):
        raise CheckpointError(f"tensor {name} has an integer of more than {scheme.bits} bits")


def codes_and_scales(
    tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...], scheme: Scheme
) -> tuple[Tensor, Tensor]:
    """What a :class:`QuantizedWeight` of a ``shape`` (O, I) is made of, from the tensors of a weight. Each output
    channel gets its own copy of a scale that is for several."""
    outputs, inputs = shape
    scales = tensors[f"{name}_scale"].view(scheme.scales(outputs, inputs))
    scales = scales.repeat_interleave(scheme.rows or outputs, 0)[:outputs]  # (O, G)
    if scheme.packed:
        return tensors[f"{name}_packed"].view(torch.uint8), scales
    return tensors[name] if scheme.floating else pack(tensors[name], scheme.bits), scales


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
