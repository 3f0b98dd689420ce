"""`scripts/bench_kernels --cards`: what every kernel needs on each kind of card, which takes no card to find out.

Kernels are compiled ahead for a compute capability. The operations are called as the check at start-up calls them, with
a driver that knows nothing but the card's name, and every launch stops after the compiler. Run in a process of its own,
without Triton's interpreter.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from kimi_vl.engine.decoder import widths
from kimi_vl.engine.engine import EngineOptions
from kimi_vl.kernels import OPERATIONS, Form, Use, triton_ops
from kimi_vl.kernels.inputs import Unset
from kimi_vl.kernels.startup_check import Calls
from kimi_vl.kernels.triton import card
from kimi_vl.model.config import PUBLISHED_TEXT

TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
REGISTERS = 255  # of a thread, on all of these


@dataclass(frozen=True)
class Card:
    """``shared``: bytes of shared memory that one program may have (CUDA C++ Programming Guide, "Technical
    Specifications per Compute Capability": maximum amount of shared memory per thread block)."""

    names: str
    shared: int


CARDS = {
    80: Card("A100", 163 << 10),
    86: Card("A10G, RTX 30", 99 << 10),
    89: Card("L40S, RTX 4090", 99 << 10),
    90: Card("H100, H200", 227 << 10),
    100: Card("B200", 227 << 10),
    120: Card("RTX 50", 99 << 10),
}


@dataclass(frozen=True)
class Compiled:
    """A kernel for a card: bytes of shared memory a program, registers a thread, bytes of them that are spilled (stack
    and local memory), the matrix instructions in use, and how many instructions load single bytes."""

    capability: int
    name: str
    shared: int
    registers: int
    spilled: int
    matrix: str
    single_bytes: int

    @property
    def fits(self) -> bool:
        return self.shared <= CARDS[self.capability].shared


class _Machine:
    """A driver in name only; what is compiled for one capability is kept apart from what is for another."""

    capability = 90

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def launches(instead: Any) -> Iterator[_Machine]:
    """Call ``instead(launch, kernel, arguments, options)`` at each launch of a kernel."""
    run, shared_memory, machine = JITFunction.run, card.shared_memory, _Machine()
    driver.set_active(machine)  # pyright: ignore[reportArgumentType]
    JITFunction.run = lambda self, *arguments, **options: instead(run, self, arguments, options)
    card.shared_memory = lambda device: CARDS[machine.capability].shared
    try:
        yield machine
    finally:
        JITFunction.run, card.shared_memory = run, shared_memory


INT8: Form = ("int8", 0, "bfloat16")
FORMS: dict[str, Form | None] = {
    "bfloat16": None,
    "int8": INT8,
    "int4": ("int4", 32, "bfloat16"),
    "int4-g128": ("int4", 128, "bfloat16"),
    "float8": ("float8", 0, "bfloat16"),
    "float8-blocks": ("float8", 128, "float32"),  # of 128 by 128, as checkpoints have them
}
FLOAT8_SINCE = 89
"""The first capability whose kernels read float8; below, checkpoints of it become bfloat16."""


def calls(options: EngineOptions | None = None, dtype: torch.dtype = torch.bfloat16, form: Form | None = None) -> Calls:
    """Those of the published model in an engine with ``options``, its weights quantised as ``form``."""
    options = options or EngineOptions()
    sizes = widths(PUBLISHED_TEXT, options.page_size)
    exact = form if form and form[0] != "int4" and not form[1] else INT8
    projections = tuple({form: None, exact: None}) if form else ()
    latent = exact if form else None
    use = Use(sizes, dtype, options.max_num_seqs, options.batched_tokens("cuda"), form, projections, latent, form)
    return Calls(use, "cpu", Unset(use.widths, dtype))


def compile_all(
    capabilities: Sequence[int], given: Sequence[Calls], operations: Sequence[str] = OPERATIONS
) -> list[Compiled]:
    """Every variant that the calls launch, for each of the cards."""
    made: dict[tuple[int, int], tuple[str, Any]] = {}

    def compile_only(run: Any, kernel: JITFunction, arguments: Any, options: Any) -> None:
        compiled = run(kernel, *arguments, **options | {"warmup": True})
        made[machine.capability, id(compiled)] = kernel.fn.__name__, compiled

    with launches(compile_only) as machine:
        for capability in capabilities:
            machine.capability = capability
            for operation in operations:
                for call in itertools.chain.from_iterable(each.of(operation) for each in given):
                    getattr(triton_ops(), operation)(*call.arguments, **call.options)
    return [_needs(capability, name, kernel) for (capability, _), (name, kernel) in made.items()]


def _needs(capability: int, name: str, kernel: Any) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        said = subprocess.run([TOOL, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack, local = (re.search(rf"{word}:(\d+)", said) for word in ("REG", "STACK", "LOCAL"))
    assert registers and stack and local, said
    code = kernel.asm["ptx"]
    matrix = next((word for word in ("wgmma", "tcgen05.mma", "mma.sync") if f"{word}." in code), "none")
    spilled = int(stack[1]) + int(local[1])
    single = len(re.findall(r"ld\.global[.:\w]*\.[bsu]8 ", code))
    return Compiled(capability, name, kernel.metadata.shared, int(registers[1]), spilled, matrix, single)


def table(found: Sequence[Compiled]) -> str:
    """A row for each kernel, a column for each card: the most that any variant needs."""
    capabilities = sorted({each.capability for each in found})
    heads = [f"{number // 10}.{number % 10} {CARDS[number].names}" for number in capabilities]
    lines = [f"| kernel | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    lines.append(
        "| **a program may have** | " + " | ".join(f"{CARDS[n].shared:,} / {REGISTERS}" for n in capabilities) + " |"
    )
    for name in dict.fromkeys(each.name for each in found):
        cells = []
        for capability in capabilities:
            own = [each for each in found if (each.name, each.capability) == (name, capability)]
            spilled = max(each.spilled for each in own)
            cells.append(
                f"{max(each.shared for each in own):,} / {max(each.registers for each in own)}"
                + (f", spills {spilled}" if spilled else "")
                + ("" if all(each.fits for each in own) else ", **too much**")
            )
        lines.append(f"| `{name.strip('_')}` ({len(own)}) | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] = ()) -> int:
    """Print the table; with ``--json`` a line for each kernel. Other arguments are capabilities, such as 8.9."""
    forms = [each for each in arguments if each in FORMS] or [*FORMS]
    others = [each for each in arguments if each not in FORMS and not each.startswith("-")]
    found = []
    for capability in [int(each.replace(".", "")) for each in others] or CARDS:
        taken = [each for each in forms if capability >= FLOAT8_SINCE or not each.startswith("float8")]
        found += compile_all([capability], [calls(form=FORMS[form]) for form in taken])
    if "--json" in arguments:
        for each in found:
            print(json.dumps(dataclasses.asdict(each)))
    else:
        print(table(found))
    return 0 if all(each.fits for each in found) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
