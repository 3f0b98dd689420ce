"""Weights packed for GEMV on a CPU, which is bound by memory bandwidth.

One core reads memory 1.5 times as fast from eight streams as from one. A matrix (O, I) is cut into panels of some of
its rows; a panel has one line of weights for each input, and the lines are in eight streams: input i is in stream
i % 8. A panel's outputs are the sum of its lines, weighted by the vector. One call of torch's ``embedding_bag``
computes all such sums, of several matrices too.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import TypeGuard

import torch
from torch import Tensor

from ..device import memory
from ..quantization.weight import Weight

# Shapes: E matrices of O rows and I inputs, each in S panels; n vectors.

STREAMS = 8
_WIDEST = 384  # outputs of a panel: so many sums fit into registers


class PackedWeight:
    """A packed copy of some ``matrices`` (O, I), panel by panel."""

    @torch.no_grad()
    def __init__(self, matrices: Sequence[Tensor]):
        outputs, self._inputs = matrices[0].shape
        width = _width(outputs, self._inputs)
        assert width
        self.count, self._panels = len(matrices), outputs // width
        shape = (self.count, self._panels, STREAMS, self._inputs // STREAMS, width)
        lines = memory.empty(shape, matrices[0].dtype, matrices[0].device)
        for panels, matrix in zip(lines, matrices, strict=True):
            parts = matrix.unflatten(1, (-1, STREAMS)).unflatten(0, (-1, width))  # (S, width, I/8, 8)
            panels.copy_(parts.permute(0, 3, 2, 1))
        self._lines = lines.flatten(0, 3)  # (E S I, width)

    def gemv(self, vectors: Tensor, matrices: Tensor | None = None) -> Tensor:
        """(n, O) of ``vectors`` (n, I): vector i by the matrix with the number ``matrices[i]``, or without these by
        matrix i. :func:`naive_gemv` is the obvious form.
        """
        if matrices is None:
            numbers = _stream_order(self.count * self._panels, self._inputs)
        else:
            own = _stream_order(self._panels, self._inputs)
            numbers = (matrices.int().unsqueeze(1) * len(own) + own).flatten()  # (n S I)
        weights = vectors.unsqueeze(1).expand(-1, self._panels, -1).reshape(-1)  # (n S I)
        offsets = _offsets(len(vectors) * self._panels, self._inputs)
        # not torch.nn.functional.embedding_bag, whose checks take as long as a small GEMV
        sums = torch.embedding_bag(self._lines, numbers, offsets, mode=0, per_sample_weights=weights)[0]
        return sums.view(len(vectors), -1)


def naive_gemv(weights: Sequence[Tensor], vectors: Tensor, matrices: Tensor | None = None) -> Tensor:
    """What :meth:`PackedWeight.gemv` computes, one GEMV after another."""
    numbers = range(len(weights)) if matrices is None else matrices.tolist()
    return torch.stack([weights[number] @ vector for number, vector in zip(numbers, vectors, strict=True)])


Experts = tuple[Weight, Weight, tuple[Weight, Weight, Weight] | None]
"""What ``moe`` is given: ``gate_up``, ``down``, ``shared``."""


def prepack(weights: Sequence[Weight], experts: Sequence[Experts]) -> dict[Tensor, PackedWeight]:
    """Pack weights in the order given, as long as the copies fit into a third of the memory that is free.

    The result maps a weight to its packed copy: each of ``weights`` (O, I) or (E, O, I), and ``gate_up`` and ``down``
    of ``experts``. Shared experts are split into experts of the routed ones' width and follow them in the same copy, so
    that one call computes all. Only bfloat16 on a CPU with AVX-512 is packed, for which torch's sums are vectorised.
    """
    spare, made = memory.available() // 3, {}
    for group in _groups(weights, experts):
        nbytes = sum(matrix.nbytes for matrices in group.values() for matrix in matrices)
        if nbytes <= spare:
            spare -= nbytes
            made |= {weight: PackedWeight(matrices) for weight, matrices in group.items()}
    return made


def _groups(weights: Sequence[Weight], experts: Sequence[Experts]) -> Iterator[dict[Tensor, list[Tensor]]]:
    """Weights that are packed together or not at all: for each weight, the matrices of its packed copy."""
    for weight in filter(_usable, weights):
        yield {weight: [weight] if weight.dim() == 2 else [*weight]}
    for gate_up, down, shared in experts:
        beside = [weight for weight in shared or () if isinstance(weight, Tensor)]
        if _usable(gate_up) and _usable(down) and len(beside) == len(shared or ()):
            width = down.shape[-1]
            both = zip(*(weight.split(width) for weight in beside[:2]), strict=True) if shared else ()
            others = beside[2].split(width, dim=1) if shared else ()
            yield {gate_up: [*gate_up, *map(torch.cat, both)], down: [*down, *others]}


def _usable(weight: Weight) -> TypeGuard[Tensor]:
    if not isinstance(weight, Tensor) or weight.device.type != "cpu" or weight.dtype != torch.bfloat16:
        return False
    outputs, inputs = weight.shape[-2:]
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512") and _width(outputs, inputs) > 0


def _width(outputs: int, inputs: int) -> int:
    """The widest panel that divides ``outputs``, in whole registers; 0 if there is none."""
    fitting = [width for width in range(16, _WIDEST + 1, 16) if outputs % width == 0]
    return max(fitting, default=0) if inputs % STREAMS == 0 else 0


@functools.cache
def _stream_order(panels: int, inputs: int) -> Tensor:
    """The lines of some panels in the order of their inputs, so that successive reads come from different streams."""
    own = torch.arange(inputs, dtype=torch.int32).view(STREAMS, -1).t().flatten()
    return (_offsets(panels, inputs).unsqueeze(1) + own).flatten()


@functools.cache
def _offsets(count: int, size: int) -> Tensor:
    """Where each of ``count`` sums of ``size`` lines begins."""
    return torch.arange(0, count * size, size, dtype=torch.int32)
