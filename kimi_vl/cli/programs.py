"""Runs the programs that live beside the package: Cog's server and the benchmarks.

In a checkout they are under ``scripts``; a wheel carries them, with predict.py, in ``kimi_vl/_project``.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
CHECKOUT = _PACKAGE.parent if (_PACKAGE.parent / "predict.py").is_file() else None
PROJECT = CHECKOUT or _PACKAGE / "_project"


def run(name: str, module: str, arguments: Sequence[str]) -> int:
    """The exit status of ``module`` with ``arguments``, in a process that takes this one's place in the terminal."""
    if module.startswith("cog_") and importlib.util.find_spec("cog") is None:
        print('error: Cog\'s server is not installed; pip install "kimi-vl[cog]" adds it', file=sys.stderr)
        return 1
    path = os.pathsep.join([str(PROJECT / "scripts"), str(_PACKAGE.parent)])
    environment = {**os.environ, "PYTHONPATH": path, "KIMI_VL_PROGRAM": f"kimi-vl {name}"}
    process = subprocess.Popen([sys.executable, "-P", "-m", module, *arguments], env=environment)
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:  # the terminal has interrupted both; a SIGTERM has reached this one alone
            process.terminate()
