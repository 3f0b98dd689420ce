"""Starts of the service that can be killed: each a process of its own, forked from one that has imported everything.

As a program it reads one request a line and forks; as a module it is the other end of that pipe. Importing torch for
every start would take longer than all starts together.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


@dataclass
class Boot:
    """A start that runs. It can be waited for and killed without being a child of ours."""

    pid: int
    handle: int
    report: Path

    def kill(self) -> None:
        signal.pidfd_send_signal(self.handle, signal.SIGKILL)

    def running(self) -> bool:
        return not select.select([self.handle], [], [], 0)[0]

    def wait(self, seconds: float = 300) -> dict[str, str] | None:
        """What it reported: a ``folder`` or an ``error``, and its ``log``; None where it was killed before."""
        assert select.select([self.handle], [], [], seconds)[0], "the start does not end"
        return json.loads(self.report.read_text()) if self.report.exists() else None


class Boots:
    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="boots-")
        self.count = 0
        self.process = subprocess.Popen(
            [sys.executable, __file__], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, model: str, cache: Path, environment: dict[str, str], **settings: Any) -> Boot:
        """Resolve ``model`` with these variables set, and these constants of `kimi_vl.weights.download`."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.count += 1
        report = Path(self.folder.name) / f"{self.count}.json"
        request = {
            "model": model,
            "cache": str(cache),
            "environment": environment,
            "settings": settings,
            "report": str(report),
        }
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        pid = int(self.process.stdout.readline())
        handle = os.pidfd_open(pid)
        self.process.stdin.write("go\n")  # so that it cannot be gone before it is held
        self.process.stdin.flush()
        return Boot(pid, handle, report)

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(timeout=300)
        self.process.stdout.close()
        self.folder.cleanup()


def _boot(request: dict[str, Any]) -> None:
    """In the child: one start, and its report under its final name only when it is whole."""
    import io
    import logging

    from kimi_vl import CheckpointError
    from kimi_vl.weights import download, resolve

    os.environ.update(request["environment"])
    for name in [name for name, value in request["environment"].items() if not value]:
        del os.environ[name]
    for name, value in request["settings"].items():
        setattr(download, name, value)
    log = io.StringIO()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=log, force=True)
    try:
        report = {"folder": str(resolve.resolve(request["model"], has_gpu=False, cache=request["cache"]))}
    except CheckpointError as error:
        report = {"error": str(error)}
    report["log"] = log.getvalue()
    part = Path(request["report"] + ".part")
    part.write_text(json.dumps(report))
    part.rename(request["report"])


def _serve() -> None:
    import kimi_vl.weights.resolve  # noqa: F401  what every start needs, once

    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        gate, opener = os.pipe()
        pid = os.fork()
        if not pid:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.close(opener)
            os.read(gate, 1)
            try:
                _boot(request)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        os.close(gate)
        print(pid, flush=True)
        sys.stdin.readline()
        os.close(opener)


if __name__ == "__main__":
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that end
    sys.path.insert(0, str(ROOT))
    _serve()
