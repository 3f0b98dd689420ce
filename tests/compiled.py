"""Compiles every kernel for an H200 (compute capability 9.0), which takes no GPU, and prints what each one needs.

Run in a process of its own, without Triton's interpreter: the operations are called as always, with a driver that
knows nothing but the machine's name, and every launch stops after the compiler.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from kimi_vl.cache import Rows
from kimi_vl.kernels import triton_mla, triton_moe, triton_norm, triton_router

TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Machine:
    """A driver in name only."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def call_all() -> None:
    """Every operation at the published widths, in bfloat16, with as many tokens as reach every plan."""
    half, single, whole = torch.bfloat16, torch.float32, torch.int32

    def new(*shape: int, dtype: torch.dtype = half) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    triton_norm.add_rms_norm(new(4, 2048), new(4, 2048), new(2048), 1e-5)
    for tokens in (1, 32):
        states = new(tokens, 2048), new(tokens, 2048), new(2048)
        triton_router.norm_router(*states, 1e-5, new(64, 2048), new(64, dtype=single), 6, 2.446)
    experts = new(64, 2816, 2048), new(64, 2048, 1408)
    shared = new(2816, 2048), new(2816, 2048), new(2048, 2816)
    for tokens in (1, 32, 512, 4096):
        choice = new(tokens, 6, dtype=whole), new(tokens, 6, dtype=single)
        triton_moe.moe(new(tokens, 2048), *choice, *experts, shared)
        if tokens <= 32:
            triton_moe.moe(new(tokens, 2048), *choice, *experts)
    entries, halves = new(4, 32, 576), new(16, 256, 512)
    to_key, to_value = halves[:, :128].transpose(1, 2), halves[:, 128:]
    for tokens, most in ((1, 64), (16, 64), (64, 1)):  # a table of one page has nothing to share
        joined, rope, slots = new(tokens, 3648), new(tokens, 128), new(tokens, dtype=torch.int64)
        triton_mla.mla_prepare(joined, to_key, new(512), rope, entries, slots, 1e-6, tokens)
        rows = Rows(new(tokens, most, dtype=whole), new(tokens, dtype=whole), 32)
        triton_mla.mla_decode(new(tokens, 16, 576), entries, rows, 0.07, to_value)


def report(name: str, kernel: Any) -> str:
    """Name, bytes of shared memory, of stack and of local memory, and the matrix instructions in use."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        said = subprocess.run([TOOL, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    stack, local = (re.search(rf"{word}:(\d+)", said) for word in ("STACK", "LOCAL"))
    assert stack and local, said
    code = kernel.asm["ptx"]
    matrix = "wgmma" if "wgmma.mma" in code else "mma" if "mma.sync" in code else "none"
    return f"{name} {kernel.metadata.shared} {stack[1]} {local[1]} {matrix}"


def main() -> None:
    driver.set_active(Machine())  # pyright: ignore[reportArgumentType]
    launch, made = JITFunction.run, {}

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = launch(self, *arguments, grid=grid, warmup=True, **options)
        # the same code at other sizes is one kernel
        shape = tuple(value for name, value in sorted(options.items()) if name.isupper())
        made[self.fn.__name__, shape, options.get("num_stages")] = kernel
        return kernel

    JITFunction.run = compile_only
    call_all()
    for (name, *_), kernel in made.items():
        print(report(name, kernel))


if __name__ == "__main__":
    main()
