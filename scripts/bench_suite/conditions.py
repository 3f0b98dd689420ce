"""Under what something is measured: the processor by its name, and what others on the machine do meanwhile.

Only the standard library is imported.
"""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

# The instruction sets that the kernels for quantised and bfloat16 weights differ by, as Linux names them.
INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8")
_TICK = os.sysconf("SC_CLK_TCK")


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The name that Linux has for it, its family and model, since several share a name, and those of
    :data:`INSTRUCTION_SETS` that it has."""
    fields: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in cpuinfo.read_text().splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
    if "model name" not in fields:
        return platform.processor() or platform.machine()
    has = fields.get("flags", "").split()
    sets = " ".join(name for name in INSTRUCTION_SETS if name in has) or "none of " + " ".join(INSTRUCTION_SETS)
    return f"{fields['model name']} (family {fields.get('cpu family')}, model {fields.get('model')}; {sets})"


def load_average() -> float:
    """Of the last minute."""
    return round(os.getloadavg()[0], 2)


class Others:
    """How many cores other processes kept busy since this was made; NaN where /proc does not tell.

    ``groups`` are the process groups of what is measured, which are not others, and neither is this process.
    """

    def __init__(self, groups: list[int]):
        self._groups = groups
        self._began, self._busy, self._own = time.monotonic(), _busy_ticks(), self._own_ticks()

    def cores(self) -> float:
        taken = (_busy_ticks() - self._busy) - (self._own_ticks() - self._own)
        return max(0.0, round(taken / _TICK / (time.monotonic() - self._began), 2))

    def _own_ticks(self) -> float:
        ticks = 0
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                fields = stat.read_text().rpartition(")")[2].split()
                if int(fields[2]) in self._groups or int(stat.parent.name) == os.getpid():
                    ticks += int(fields[11]) + int(fields[12])
        return ticks


def _busy_ticks() -> float:
    try:
        fields = Path("/proc/stat").read_text().split(maxsplit=9)[1:9]
    except OSError:
        return float("nan")
    user, nice, system, _idle, _waiting, *interrupts = map(int, fields[:7])
    return user + nice + system + sum(interrupts)


@contextlib.contextmanager
def busy_neighbour() -> Iterator[int]:
    """One process that keeps a core busy, as long as the block runs; its process group."""
    process = subprocess.Popen([sys.executable, "-I", "-c", "while True: pass"], process_group=0)
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()
