"""The check of the kernels at start-up: each is compiled for this device, run, and compared with the reference.

FlashAttention is checked in the same way where it is installed.

The check runs in a process of its own. A kernel that never ends cannot be stopped from within its process, and one with
an illegal memory access leaves its process without a GPU. Both end with the process, which is killed after a limit; a
new process then goes on with the operations that are left. The serving process finds what was compiled there in
Triton's compile cache (``TRITON_CACHE_DIR``, else ``~/.triton/cache``).

A kernel is refused where it does not compile, needs more shared memory than the GPU has, fails, takes longer than
``CALL_S`` for one call, compiling included, or where its result differs from the reference, computed in the same dtype,
by more than ``AGREEING`` allows: in bfloat16 2 to 3 roundings of each, which is 1.6 % to 2.3 % of the norm.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import queue
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch

from . import OPERATIONS, REFERENCE, TORCH, VARIABLE, Ops, Use, Widths, flash_attention, native_ops, triton_ops
from .inputs import Call, Inputs, Unset, apart

CALL_S = 60.0
"""The limit of one call: a kernel compiles within seconds, and runs for less than a second."""
START_S = 180.0
"""The limit for the process to import torch and to find the device."""
KILLED_S = 10.0
AGREEING = 2
"""Times :meth:`Call.tolerance`: once for the kernel and once for the reference."""
NATIVE_WIDTHS = Widths(
    hidden=256,
    experts=8,
    top_k=3,
    inner=96,
    shared=160,
    dense=320,
    heads=2,
    rank=64,
    rope=32,
    nope=64,
    value=64,
    page_size=16,
)
"""Widths that have every format's blocks, and not only whole tiles of them."""
COMMAND = (sys.executable, "-m", __name__)

_running: dict[tuple[torch.device, Use], Future[dict[str, str]]] = {}


def token_counts(most: int) -> list[int]:
    """1, 2, 4, … and ``most``: token counts that together launch every variant of a step of up to ``most`` tokens."""
    return [*(1 << power for power in range(most.bit_length()) if 1 << power < most), most]


class Calls:
    """Calls of each operation as an engine's steps make them: all variants of its kernels, at the model's widths."""

    def __init__(self, use: Use, device: torch.device | str, inputs: Inputs | None = None):
        self._use, self._inputs = use, inputs or Inputs(use.widths, use.dtype, device)
        self._on_gpu = self._inputs.device.type != "cpu"

    def of(self, operation: str) -> Iterator[Call]:
        return getattr(self, operation)()

    def add_rms_norm(self) -> Iterator[Call]:
        yield self._inputs.add_rms_norm(1, delta=False)
        yield self._inputs.add_rms_norm(self._use.max_num_batched_tokens)

    def norm_router(self) -> Iterator[Call]:
        for tokens in (1, self._use.max_num_batched_tokens):
            yield self._inputs.norm_router(tokens)

    def project(self) -> Iterator[Call]:
        """On a GPU of quantised weights alone, since the others have no kernel of their own there.

        Only widths that a form's groups divide: there are no other weights.
        """
        widths = self._inputs.widths
        own = [widths.hidden, widths.heads * widths.value, widths.dense, widths.rank]
        if self._use.shared != self._use.experts:  # they are projections then
            own.append(widths.shared)
        for form in self._use.projections if self._on_gpu else (None, *self._use.projections):
            for width in [each for each in dict.fromkeys(own) if not (form and form[1] and each % form[1])]:
                weight = self._inputs.weight(192, width, scale=1.0, form=form)
                for tokens in token_counts(self._use.max_num_batched_tokens):
                    yield self._inputs.project(tokens, weight)

    def moe(self) -> Iterator[Call]:
        inputs, form = self._inputs, self._use.experts
        weights = inputs.experts(form), inputs.shared_experts(self._use.shared)
        for tokens in token_counts(self._use.max_num_batched_tokens):
            yield inputs.moe(tokens, shared=inputs.widths.shared > 0, weights=weights)

    def mla_prepare(self) -> Iterator[Call]:
        yield self._inputs.mla_prepare(1, form=self._use.latent)
        decoding = min(self._use.max_num_seqs, self._use.max_num_batched_tokens - 1)
        yield self._inputs.mla_prepare(self._use.max_num_batched_tokens, decoding, unwritten=1, form=self._use.latent)

    def mla_decode(self) -> Iterator[Call]:
        """Short contexts, which are one split, and longer ones with several."""
        for count in token_counts(self._use.max_num_seqs):
            yield self._inputs.mla_decode([3] * count, form=self._use.latent)
            yield self._inputs.mla_decode(
                [700, *[1, 64, 33][: count - 1]] + [5] * (count - 4),
                1024 // self._use.widths.page_size,
                form=self._use.latent,
            )

    def mla_prefill(self) -> Iterator[Call]:
        """Chunks of new prompts, and with other tokens before them."""
        for tokens in token_counts(self._use.max_num_batched_tokens)[1:]:  # one token is not a chunk
            for before in (0, 333):
                yield self._inputs.mla_prefill(tokens, before + tokens)


def reason_against(
    operation: str, ops: Ops, calls: Iterator[Call], dtype: torch.dtype, begins: Callable[[], object] = lambda: None
) -> str:
    """Why a kernel is refused, or "". ``begins`` is called before each call of the operation."""
    try:
        begins()
        for call in calls:
            away = apart(call, call.run(ops), dtype, ties=True, wanted=call.run(REFERENCE))
            if not away <= AGREEING:
                return f"its result is off by {away:.1f} times what rounding explains, and {AGREEING} times is allowed"
            begins()
    except Exception as error:
        return _compiling(error) or f"it fails ({_first_line(error)})"
    return ""


def _compiling(error: Exception) -> str:
    """What is wrong where ``error`` is of Triton's compiler, else ""."""
    if "triton" not in sys.modules:
        return ""
    import triton
    from triton.runtime.errors import OutOfResources, PTXASError

    if isinstance(error, OutOfResources):
        return f"a program needs {error.required} of {error.name}, and this card has {error.limit}"
    return (
        f"it does not compile ({_first_line(error)})" if isinstance(error, triton.CompilationError | PTXASError) else ""
    )


def launch_all(ops: Ops, device: torch.device, use: Use) -> None:
    """Launch every variant once, so that this process compiles nothing while it serves.

    Raises RuntimeError with a sentence where a kernel cannot be launched, which may be one that was not checked.
    """
    calls = Calls(use, device, Unset(use.widths, use.dtype, device))
    for operation in OPERATIONS:
        if getattr(ops, operation) is getattr(TORCH, operation):
            continue
        try:
            with torch.inference_mode(), _current(device):
                for call in calls.of(operation):
                    call.run(ops)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
        except Exception as error:
            raise RuntimeError(
                f"the kernel of {operation} cannot run on this GPU ({type(error).__name__}); unset {VARIABLE}, so that "
                "PyTorch takes its place"
            ) from error
    if device.type == "cuda":
        torch.cuda.empty_cache()  # before the memory that is left is counted


# The serving process


def begin(device: torch.device, use: Use) -> Future[dict[str, str]]:
    """Start the check in the background, once for the same device and sizes."""
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if (device, use) not in _running:
        future: Future[dict[str, str]] = Future()
        _running[device, use] = future

        def work() -> None:
            try:
                future.set_result(check(device, use) if device.type == "cuda" else check_native(use))
            except Exception as error:
                future.set_exception(error)

        threading.Thread(target=work, name="kimi_vl kernel check", daemon=True).start()
    return _running[device, use]


def refusals(device: torch.device, use: Use) -> dict[str, str]:
    """The refused operations, each with its reason. Waits for the check."""
    return begin(device, use).result()


def check(
    device: torch.device,
    use: Use,
    command: Sequence[str] = COMMAND,
    call_seconds: float = CALL_S,
    start_seconds: float = START_S,
) -> dict[str, str]:
    """Run the check and return the refused operations. ``command`` starts a process that runs :func:`main`."""
    left, refused = [*OPERATIONS, *flash_attention.candidates(device)], {}
    while left:
        before = len(left)
        with _Checker(command, _encoded(device, use, left)) as checker:
            current = ""
            while left:
                try:
                    message = checker.next(call_seconds if current else start_seconds)
                except TimeoutError:
                    ended = f"a call does not end within {call_seconds:g} s"
                    break
                if message is None:
                    ended = f"the process that checks it ended (exit status {checker.status()})"
                    break
                current, reason = message["operation"], message.get("reason")
                if reason is not None:
                    left.remove(current)
                    if reason:
                        refused[current] = reason
                    current = ""
            else:
                break
        if current:
            left.remove(current)
            refused[current] = ended
        elif len(left) == before:  # not even a first operation
            refused |= dict.fromkeys(left, "kernels cannot be checked here: the process for that does not start")
            break
    return refused


def native_widths(use: Use) -> Widths:
    """:data:`NATIVE_WIDTHS`, widened to whole groups of the experts' weights, and to more than one."""
    group = math.lcm(*(form[1] or 1 for form in (use.experts, use.shared) if form))
    names = "hidden", "inner", "shared"
    wider = {name: max(2, -(-getattr(NATIVE_WIDTHS, name) // group)) * group for name in names}
    return dataclasses.replace(NATIVE_WIDTHS, **wider)


def check_native(use: Use) -> dict[str, str]:
    """:func:`check` for native kernels, at widths that take a second. What a library has passed is not checked again.

    Raises :class:`kimi_vl.kernels.cpu.build.Unavailable` where there are none.
    """
    from .cpu import build

    use = dataclasses.replace(use, widths=native_widths(use), max_num_seqs=17, max_num_batched_tokens=100)
    device = torch.device("cpu")
    passed = Path(build.library()._name).with_suffix(f".{zlib.crc32(_encoded(device, use, OPERATIONS).encode()):08x}")
    if passed.exists():
        return {}
    refused = check(device, use)
    if not refused:
        with contextlib.suppress(OSError):
            passed.touch()
    return refused


class _Checker:
    """A checking process and the lines that it prints."""

    def __init__(self, command: Sequence[str], job: str):
        path = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", ""))))
        self._process = subprocess.Popen(
            [*command, job],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": path},
        )
        self._lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def __enter__(self) -> _Checker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may keep it from ending
            self._process.wait(KILLED_S)

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self._lines.put(line)
        self._lines.put(b"")

    def next(self, seconds: float) -> dict[str, Any] | None:
        """The next message, or None at the end. Raises TimeoutError."""
        try:
            line = self._lines.get(timeout=seconds)
        except queue.Empty:
            raise TimeoutError from None
        return json.loads(line) if line else None

    def status(self) -> int:
        return self._process.wait(KILLED_S)


def _encoded(device: torch.device, use: Use, operations: Sequence[str]) -> str:
    values = dataclasses.asdict(use) | {"dtype": str(use.dtype).removeprefix("torch.")}
    return json.dumps({"device": str(device), "use": values, "operations": operations})


# The checking process


def main(ops: Ops | None = None) -> int:
    """Check the operations that the last argument names; print a line before each call and one with each verdict."""
    job = json.loads(sys.argv[-1])
    device, values = torch.device(job["device"]), job["use"]
    decoded = {
        "widths": Widths(**values["widths"]),
        "dtype": getattr(torch, values["dtype"]),
        "experts": values["experts"] and tuple(values["experts"]),
        "projections": tuple(map(tuple, values["projections"])),
        "latent": values["latent"] and tuple(values["latent"]),
        "shared": values["shared"] and tuple(values["shared"]),
    }
    use = Use(**values | decoded)
    told = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to stderr

    def tell(operation: str, **more: str) -> None:
        told.write(json.dumps({"operation": operation, **more}) + "\n")
        told.flush()

    ops = ops or (triton_ops() if device.type == "cuda" else native_ops())
    calls = Calls(use, device, Inputs(use.widths, use.dtype, device, block=ops.block))
    with torch.inference_mode(), _current(device):
        for operation in job["operations"]:
            reason = ""
            if operation not in OPERATIONS:
                tell(operation)
                reason = flash_attention.reason_against(operation, device)
            elif getattr(ops, operation) is not getattr(TORCH, operation):
                reason = reason_against(operation, ops, calls.of(operation), use.dtype, lambda: tell(operation))  # noqa: B023
            tell(operation, reason=reason)
            if reason and device.type == "cuda":
                torch.cuda.synchronize(device)  # raises where the device is lost; another process then goes on
    return 0


def _current(device: torch.device) -> torch.cuda.device:
    """Triton launches on the current device, wherever the tensors are. -1 changes nothing."""
    return torch.cuda.device(device if device.type == "cuda" else -1)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


if __name__ == "__main__":
    sys.exit(main())
