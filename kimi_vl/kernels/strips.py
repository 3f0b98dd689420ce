"""Matrices a second time, laid out for products with one vector on a CPU, whose speed is that of reading them.

A core reads memory half as fast again from eight places at once as from one. So a matrix (O, I) is cut into strips of
some of its rows, and a strip has a line of these for each input, in eight streams: input i is in stream i % 8. The part
of a product that belongs to a strip is the sum of its lines, weighted by the vector, and one call of torch's takes all
such sums, of several matrices too. Knows matrices and vectors alone.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..device import memory
from ..model import language

# Shapes: E matrices of O rows and I inputs, each in S strips; n vectors.

STREAMS = 8
_WIDEST = 384  # as many sums stay in registers


class Strips:
    """Some ``matrices`` (O, I), strip by strip."""

    @torch.no_grad()
    def __init__(self, matrices: Sequence[Tensor]):
        outputs, self._inputs = matrices[0].shape
        width = _width(outputs, self._inputs)
        assert width
        self.count, self._strips = len(matrices), outputs // width
        shape = (self.count, self._strips, STREAMS, self._inputs // STREAMS, width)
        lines = memory.empty(shape, matrices[0].dtype, matrices[0].device)
        for strips, matrix in zip(lines, matrices, strict=True):
            parts = matrix.unflatten(1, (-1, STREAMS)).unflatten(0, (-1, width))  # (S, width, I/8, 8)
            strips.copy_(parts.permute(0, 3, 2, 1))
        self._lines = lines.flatten(0, 3)  # (E S I, width)

    def product(self, vectors: Tensor, matrices: Tensor | None = None) -> Tensor:
        """(n, O) of ``vectors`` (n, I), each by one of ``matrices`` (n), their numbers; None: by all, in order."""
        if matrices is None:
            numbers = _in_turns(self.count * self._strips, self._inputs)
        else:
            own = _in_turns(self._strips, self._inputs)
            numbers = (matrices.int().unsqueeze(1) * len(own) + own).flatten()  # (n S I)
        weights = vectors.unsqueeze(1).expand(-1, self._strips, -1).reshape(-1)  # (n S I)
        begins = _begins(len(vectors) * self._strips, self._inputs)
        # torch.nn.functional's would check again what is right here, for as long as a small operation takes
        sums = torch.embedding_bag(self._lines, numbers, begins, mode=0, per_sample_weights=weights)[0]
        return sums.view(len(vectors), -1)


Experts = tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor] | None]
"""What ``moe`` is given: ``gate_up``, ``down``, ``shared``."""


def lay_out(weights: Sequence[Tensor], experts: Sequence[Experts]) -> dict[Tensor, Strips]:
    """Strips of what takes no more than a third of the memory that is free, the first first.

    Each of ``weights`` (O, I) or (E, O, I) has its own. Those of ``experts`` are found under ``gate_up`` and ``down``;
    behind the routed ones are the shared, as so many of the same width, so that a call is for all of them. That is for
    bfloat16 on a CPU that has AVX-512, which torch's sums are made for.
    """
    spare, made = memory.available() // 3, {}
    for group in _groups(weights, experts):
        nbytes = sum(matrix.nbytes for matrices in group.values() for matrix in matrices)
        if nbytes <= spare:
            spare -= nbytes
            made |= {weight: Strips(matrices) for weight, matrices in group.items()}
    return made


def _groups(weights: Sequence[Tensor], experts: Sequence[Experts]) -> Iterator[dict[Tensor, list[Tensor]]]:
    """What is of use together only: which matrices are laid out as one, under what they are found."""
    for weight in filter(_usable, weights):
        yield {weight: [weight] if weight.dim() == 2 else [*weight]}
    for gate_up, down, shared in experts:
        if _usable(gate_up) and _usable(down):
            width = down.shape[-1]
            both = zip(*(weight.split(width) for weight in shared[:2]), strict=True) if shared else ()
            others = shared[2].split(width, dim=1) if shared else ()
            yield {gate_up: [*gate_up, *map(torch.cat, both)], down: [*down, *others]}


def project(states: Tensor, weight: Tensor, laid_out: Mapping[Tensor, Strips]) -> Tensor:
    """:func:`kimi_vl.model.language.project` of ``states`` (T, I), from strips where they exist, for one vector."""
    strips = laid_out.get(weight) if len(states) == 1 else None
    return language.project(states, weight) if strips is None else strips.product(states)


def mlp(states: Tensor, weights: tuple[Tensor, Tensor, Tensor], laid_out: Mapping[Tensor, Strips]) -> Tensor:
    """down(silu(gate x) * up x) of ``states`` (T, H); ``weights`` are those of gate, up and down."""
    gate, up, down = weights
    inner = F.silu(project(states, gate, laid_out)) * project(states, up, laid_out)
    return project(inner, down, laid_out)


def _usable(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16:
        return False
    outputs, inputs = weight.shape[-2:]
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512") and _width(outputs, inputs) > 0


def _width(outputs: int, inputs: int) -> int:
    """Of strips: the greatest that fits, in whole registers; 0 where none does."""
    fitting = [width for width in range(16, _WIDEST + 1, 16) if outputs % width == 0]
    return max(fitting, default=0) if inputs % STREAMS == 0 else 0


@functools.cache
def _in_turns(strips: int, inputs: int) -> Tensor:
    """Numbers of the lines of some strips, input after input, and so from one stream after another."""
    own = torch.arange(inputs, dtype=torch.int32).view(STREAMS, -1).t().flatten()
    return (_begins(strips, inputs).unsqueeze(1) + own).flatten()


@functools.cache
def _begins(count: int, size: int) -> Tensor:
    """Where each of ``count`` sums of ``size`` lines begins."""
    return torch.arange(0, count * size, size, dtype=torch.int32)
