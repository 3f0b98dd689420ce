"""Matrices that are no plain tensors: small numbers with scales, or in blocks.

Numbers and scales are in the bytes that a compressed-tensors checkpoint has.

The inputs of an output channel are cut into groups, and each group has a scale; a group of all inputs is one scale a
channel. An integer of ``bits`` bits is stored as its code: the integer plus half of the codes there are, so that codes
are never negative. Codes follow one another along the inputs, the first in the lowest bits. A number of float8 (e4m3:
4 bits of exponent, 3 of mantissa) is its own code. Knows neither models nor files.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

# Shapes: E matrices of O output channels and I inputs, G groups of a channel.

FLOAT8 = torch.float8_e4m3fn  # finite up to 448, and NaN; no infinity


def pack(integers: Tensor, bits: int) -> Tensor:
    """Bytes (…, I * bits / 8), uint8, of integers (…, I) between -2^(bits-1) and 2^(bits-1) - 1; ``bits`` 4 or 8."""
    codes = (integers.to(torch.int16) + (1 << bits - 1)).to(torch.uint8)
    return codes if bits == 8 else codes[..., 0::2] | codes[..., 1::2] << 4


def unpack(codes: Tensor, bits: int) -> Tensor:
    """The integers (…, I), int8, of :func:`pack`'s bytes."""
    if bits == 4:
        codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)
    return (codes.to(torch.int16) - (1 << bits - 1)).to(torch.int8)


class QuantizedWeight(nn.Module):
    """One matrix (O, I) or several (E, O, I): number times scale, in the place of a floating-point parameter.

    ``codes`` (…, O, I * bits / 8) is uint8, as :func:`pack` makes it, or with 8 bits float8; ``scales`` (…, O, G) are
    floating-point. ``bits`` is 4 or 8. Raises ValueError where codes and scales do not belong together.
    """

    def __init__(self, codes: Tensor, scales: Tensor, bits: int):
        super().__init__()
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.scales = nn.Parameter(scales, requires_grad=False)
        self.bits = bits
        inputs = codes.shape[-1] * 8 // bits
        groups = scales.shape[-1]
        if codes.shape[:-1] != scales.shape[:-1] or not groups or inputs % groups:
            raise ValueError(f"codes {tuple(codes.shape)} and scales {tuple(scales.shape)} are of different matrices")

    @property
    def shape(self) -> torch.Size:
        """Of the matrices."""
        return torch.Size((*self.codes.shape[:-1], self.codes.shape[-1] * 8 // self.bits))

    @property
    def kind(self) -> str:
        """Of the numbers: "int4", "int8" or "float8"."""
        return "float8" if self.codes.dtype == FLOAT8 else f"int{self.bits}"

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return self.shape[-1] // self.scales.shape[-1]

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, index: int | slice | tuple[int | slice, ...]) -> QuantizedWeight:
        """Some of the matrices, or of their output channels; shares memory with this one."""
        return QuantizedWeight(self.codes[index], self.scales[index], self.bits)

    def by_head(self, count: int) -> QuantizedWeight:
        """The ``count`` matrices (count, O / count, I) that one matrix (O, I) is, one below the other; shares memory
        with it."""
        codes, scales = (each.unflatten(0, (count, -1)) for each in (self.codes, self.scales))
        return QuantizedWeight(codes, scales, self.bits)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The matrices (…, O, I) in ``dtype``, each product of number and scale rounded once."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        numbers = self.codes if self.kind == "float8" else unpack(self.codes, self.bits)
        grouped = numbers.unflatten(-1, (-1, self.group))  # (…, O, G, I / G)
        return (grouped.to(wide) * self.scales.to(wide).unsqueeze(-1)).flatten(-2).to(dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.shape)}, {self.kind}, group={self.group}"


BLOCK = 16
"""Output channels of a block of a :class:`BlockedWeight`."""
INPUTS = 32
"""Inputs of such a weight are a multiple of this, and so is a group of them."""


def fits(weight: Tensor | QuantizedWeight) -> bool:
    """Whether a :class:`BlockedWeight` can be made of ``weight`` (…, O, I): bfloat16, 8 bits with a scale for each
    output channel, or 4 bits with groups; contiguous, and of whole blocks."""
    outputs, inputs = weight.shape[-2:]
    if outputs % BLOCK or inputs % INPUTS:
        return False
    if isinstance(weight, Tensor):
        return weight.dtype == torch.bfloat16 and weight.is_contiguous()
    grouped = weight.group % INPUTS == 0 if weight.bits == 4 else weight.group == inputs
    return weight.kind != "float8" and grouped and weight.codes.is_contiguous() and weight.scales.is_contiguous()


class BlockedWeight(nn.Module):
    """One matrix (O, I) or several (E, O, I) in the layout of native CPU kernels, in the memory of the plain weight.

    Output channels are in blocks of 16. Within a block, units of 4 bytes along the inputs (2 bfloat16 values, 4 codes
    of 8 bits or 8 codes of 4) are transposed: (16, units) becomes (units, 16). So are a block's scales. ``stored`` is
    what the plain weight was, with its shapes; parts that begin and end with a block are parts of the plain weight.
    """

    def __init__(self, stored: Tensor | QuantizedWeight):
        super().__init__()
        if isinstance(stored, Tensor) and not isinstance(stored, nn.Parameter):
            stored = nn.Parameter(stored, requires_grad=False)
        self.stored: Tensor | QuantizedWeight = stored

    @property
    def shape(self) -> torch.Size:
        """Of the matrices."""
        return self.stored.shape

    @property
    def device(self) -> torch.device:
        return self.stored.device

    @property
    def nbytes(self) -> int:
        return self.stored.nbytes

    @property
    def bits(self) -> int:
        """Of a value: 16 for bfloat16."""
        return 16 if isinstance(self.stored, Tensor) else self.stored.bits

    def __len__(self) -> int:
        return len(self.stored)

    def __getitem__(self, index: int | slice) -> BlockedWeight:
        """Some of the matrices, or a matrix's channels from one block to another; shares memory with this one."""
        return BlockedWeight(self.stored[index])

    def plain(self) -> Tensor | QuantizedWeight:
        """A copy in the usual layout."""
        if isinstance(self.stored, Tensor):
            return _untransposed(self.stored.detach().view(torch.int32)).view(self.stored.dtype)
        codes = _untransposed(self.stored.codes.detach().view(torch.int32)).view(torch.uint8)
        return QuantizedWeight(codes, _untransposed(self.stored.scales.detach()), self.stored.bits)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The matrices (…, O, I) in ``dtype`` and in the usual layout."""
        plain = self.plain()
        return plain.to(dtype) if isinstance(plain, Tensor) else plain.dequantize(dtype)


def transpose(values: Tensor) -> None:
    """Transpose the blocks of ``values`` (…, O, units), contiguous, in place."""
    for matrix in values.view(-1, *values.shape[-2:]):  # a copy of one at a time
        blocks = matrix.view(-1, BLOCK, matrix.shape[-1])
        matrix.copy_(blocks.transpose(1, 2).reshape(matrix.shape))


def _untransposed(values: Tensor) -> Tensor:
    blocks = values.unflatten(-2, (-1, BLOCK)).flatten(-2).unflatten(-1, (-1, BLOCK))  # (…, O / 16, units, 16)
    return blocks.transpose(-1, -2).reshape(values.shape)


Weight = Tensor | QuantizedWeight | BlockedWeight
"""What a GEMM takes."""


def dense(weight: Weight, dtype: torch.dtype) -> Tensor:
    """``weight`` itself where it is a tensor, else its values in ``dtype`` and in the usual layout."""
    return weight if isinstance(weight, Tensor) else weight.dequantize(dtype)


def joined(weights: Sequence[QuantizedWeight]) -> QuantizedWeight | None:
    """One matrix of the output channels of several, or None where these are quantised in different ways.

    The given ones become parts of it, so that it takes no memory of its own.
    """
    first = weights[0]
    if len({(each.kind, each.group, each.scales.dtype) for each in weights}) > 1:
        return None
    whole = QuantizedWeight(
        torch.cat([each.codes for each in weights]), torch.cat([each.scales for each in weights]), first.bits
    )
    begin = 0
    for each in weights:
        part = whole[begin : begin + len(each)]
        each.codes.data, each.scales.data = part.codes.data, part.scales.data
        begin += len(each)
    return whole
