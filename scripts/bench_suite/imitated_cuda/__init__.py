"""GPUs imitated on a CPU, for machines that have none: what the project's CUDA path does is seen and judged there.

``with imitated() as machine:`` puts a :class:`Machine` in the place of torch's CUDA, for all threads that begin within.
Tensors on ``cuda:0``, ``cuda:1`` say so; their values are computed on the CPU. ``machine.findings`` is what real
devices would refuse or answer wrongly; ``machine.counts`` counts launches, waits, copies and bytes:

    before = copy.copy(machine.counts)
    ...
    print((machine.counts - before).launches)

Import this before any kernel, since Triton decides on import whether kernels are interpreted. It sees the order of
work by what streams and the host know of each other, not by time. It cannot see speed, the memory that libraries
take, what their kernels refuse for reasons not listed in ``tensors.py``, numbers as a GPU rounds them, or orders
between several threads of the host, which count as one.
"""

from bench_suite import triton_on_cpu

from .api import imitated
from .kernels import Compiler
from .machine import A100, H100, L40S, Card, Counts, Event, Finding, Machine, Stream, current
from .tensors import DeviceTensor

assert triton_on_cpu  # before any kernel, and before any other module of this package

__all__ = [
    "A100",
    "H100",
    "L40S",
    "Card",
    "Compiler",
    "Counts",
    "DeviceTensor",
    "Event",
    "Finding",
    "Machine",
    "Stream",
    "current",
    "imitated",
]
