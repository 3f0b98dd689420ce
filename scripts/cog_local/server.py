"""Starts, watches and stops Cog's own HTTP server without Docker; the program behind `scripts/serve`."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from cog_local import schema
from cog_local.client import Client, ServerGone

ROOT = Path(__file__).resolve().parents[2]
DRAIN_SECONDS = 10.0
MEMORY = {"MALLOC_ARENA_MAX": "2"}
"""Of the environment in cog.yaml, what decides how much memory the server's processes keep."""

# Runs Cog's server, and ends it with its worker when our end of its stdin closes: if we are killed outright,
# nobody else will.
LAUNCH = """
import os, runpy, signal, threading

def watch():
    os.read(0, 1)
    os.killpg(0, signal.SIGKILL)

threading.Thread(target=watch, daemon=True).start()
runpy.run_module("cog.server.http", run_name="__main__", alter_sys=True)
"""

Log = Callable[[str], None]


class ServerError(Exception):
    """The server could not be started, or its set-up failed; the message is for the person who started it."""


def has_gpu(environment: Mapping[str, str]) -> bool:
    """Whether an NVIDIA GPU is there and visible, found out without importing torch."""
    if environment.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return False
    if Path("/dev/nvidia0").exists():
        return True
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return False
    try:
        listing = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listing.returncode == 0 and "GPU " in listing.stdout


def model_environment(environment: Mapping[str, str], log: Log) -> dict[str, str]:
    """The environment with KIMI_VL_MODEL settled: as set, else the real model on a GPU, else the demo."""
    settled = dict(environment)
    model = settled.get("KIMI_VL_MODEL")
    if model:
        if os.sep in model and Path(model).is_dir():
            settled["KIMI_VL_MODEL"] = str(Path(model).resolve())  # the server runs in another folder
        return settled
    if has_gpu(settled):
        settled["KIMI_VL_MODEL"] = "thinking"
    else:
        settled["KIMI_VL_MODEL"] = "demo"
        # matrices as small as the demo model's gain nothing from a second thread, and wait for it
        settled.setdefault("OMP_NUM_THREADS", "1")
        log("no CUDA GPU found: answering with the demo model, not with Kimi-VL (set KIMI_VL_MODEL to choose)")
    return settled


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """A running server, as a context manager: ready on entry, gone with all its processes on exit.

    `log` receives what the model prints while it is set up, and Cog's warnings. `port=None`: a free port.
    """

    def __init__(
        self,
        root: Path = ROOT,
        *,
        environment: Mapping[str, str] | None = None,
        host: str = "127.0.0.1",
        port: int | None = None,
        log: Log | None = None,
        concurrent: bool = False,
    ) -> None:
        self.root = root
        self.predictor = "ConcurrentPredictor" if concurrent else "Predictor"
        self.environment = dict(os.environ if environment is None else environment)
        self.slots = 1
        """How many requests it takes at a time."""
        self.host = host
        self.fixed_port = port
        self.port = 0
        self.log = log or (lambda line: None)
        self.lines: deque[str] = deque(maxlen=2000)
        """The last lines of the server's own log, as it wrote them."""
        self.process: subprocess.Popen[str] | None = None

    @property
    def url(self) -> str:
        host = "127.0.0.1" if self.host in ("", "0.0.0.0") else self.host
        if ":" in host:
            host = f"[{host}]"
        return f"http://{host}:{self.port}"

    @property
    def client(self) -> Client:
        return Client(self.url)

    def __enter__(self) -> Server:
        schema.write(self.root, self.predictor)
        self.slots = schema.slots((self.root / "predict.py").read_text(encoding="utf-8"), self.predictor)
        try:
            # Between choosing a free port and using it, somebody else may take it.
            for attempts_left in (2, 1, 0):
                self._start()
                try:
                    self._wait_until_ready()
                    break
                except ServerError:
                    if self.fixed_port is not None or not attempts_left or not self._port_was_taken():
                        raise
                    self.stop()
        except BaseException:
            self.stop(drain=False)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop(drain=kind is None)

    def _start(self) -> None:
        self.port = free_port() if self.fixed_port is None else self.fixed_port
        binaries = str(Path(sys.executable).parent)
        environment = {
            **MEMORY,
            **self.environment,
            # Cog starts its worker as plain `python`, so the right one has to come first.
            "PATH": binaries + os.pathsep + self.environment.get("PATH", os.defpath),
            "PORT": str(self.port),
            "COG_PREDICT_TYPE_STUB": f"predict.py:{self.predictor}",
            "COG_MAX_CONCURRENCY": str(self.slots),
            "LOG_FORMAT": "json",
        }
        self.lines.clear()
        self._started_at = time.time()
        self.process = subprocess.Popen(
            [sys.executable, "-c", LAUNCH, "--host", self.host],
            cwd=self.root,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
            # A group of its own: Ctrl-C in the terminal reaches only us, and stopping reaches the worker too.
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read_log, args=(self.process,), daemon=True)
        self._reader.start()

    def _read_log(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self.lines.append(line.rstrip("\n"))
            shown = _progress(line)
            if shown:
                with contextlib.suppress(Exception):  # a closed terminal must not stop the reading
                    self.log(shown)

    def _wait_until_ready(self) -> None:
        assert self.process is not None
        delay = 0.02
        while True:
            code = self.process.poll()
            if code is not None:
                self._reader.join(timeout=2)
                raise ServerError(f"Cog's server ended with {_how(code)}; the last that it said: {self._last_words()}")
            with contextlib.suppress(ServerGone):
                health = self.client.health()
                if not self._is_ours(health):
                    pass
                elif health["status"] == "READY":
                    return
                elif health["status"] not in ("STARTING", "UNKNOWN"):
                    logs = health["setup"].get("logs") or health["status"]
                    raise ServerError(f"the set-up failed: {_setup_error(logs)}")
            time.sleep(delay)
            delay = min(0.2, delay * 1.3)

    def _is_ours(self, health: dict[str, Any]) -> bool:
        """Whether our server says this: where the port was taken, one that is older than ours answers."""
        try:
            return datetime.fromisoformat(health["setup"]["started_at"]).timestamp() >= self._started_at
        except (KeyError, TypeError, ValueError):
            return False

    def _port_was_taken(self) -> bool:
        return any("Address already in use" in line for line in self.lines)

    def _last_words(self) -> str:
        said = (_message(line) for line in reversed(self.lines))
        return next((words for words in said if words), "nothing")

    def stop(self, drain: bool = True) -> None:
        """Ends the server; with `drain`, requests in flight get seconds to finish. May be called again."""
        process = self.process
        if process is None:
            return
        if process.poll() is None:
            # The leader alone: a worker that gets the signal too would drop what the leader waits for.
            process.terminate()
            # A second Ctrl-C means now.
            with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
                process.wait(timeout=DRAIN_SECONDS if drain else 1.0)
        # A worker outlives its server while it is being set up.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        self._reader.join(timeout=5)
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
        self.process = None

    def wait(self) -> int:
        """Waits until the server ends by itself and returns its exit status."""
        assert self.process is not None
        return self.process.wait()


def _how(code: int) -> str:
    """An exit status in words."""
    if code == -signal.SIGKILL:
        return "signal 9 (what a machine does that has no memory left)"
    return f"status {code}" if code >= 0 else f"signal {-code}"


def _message(line: str) -> str:
    """The last line of the text in a line of the server's log, which is JSON or not."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        line = str(json.loads(line)["fields"]["message"])
    return next((words for part in reversed(line.splitlines()) if (words := part.strip())), "")


def _progress(line: str) -> str:
    """What a person wants to see of one line of the server's log; empty for most lines."""
    try:
        entry: dict[str, Any] = json.loads(line)
        message = str(entry["fields"]["message"])
        target, level = entry["target"], entry["level"]
    except (ValueError, KeyError, TypeError):
        return ""
    if "deprecated" in message.lower():
        return ""
    if target == "coglet::setup" or "source" in entry["fields"]:
        return message  # what the model printed
    if message in ("Setup failed", "Worker initialization failed"):
        return ""  # ServerError says why
    return message if level in ("WARN", "ERROR") else ""


def _setup_error(logs: str) -> str:
    """The reason at the end of a failed set-up's log, without the words that Cog puts before it."""
    line = logs.strip().splitlines()[-1] if logs.strip() else "no reason was given"
    return re.split(r"\bsetup failed(?: \([^)]*\))?: ", line, flags=re.IGNORECASE)[-1]


def say(line: str) -> None:
    """One line on stderr, for a person."""
    print(line, file=sys.stderr, flush=True)


def interrupt_on_signals() -> None:
    """Makes SIGTERM and SIGHUP end the program as Ctrl-C does, so that the server is stopped on the way."""

    def interrupt(number: int, frame: object) -> NoReturn:
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 2**16):
        raise argparse.ArgumentTypeError("a port is a number from 1 to 65535")
    return int(text)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog=os.environ.get("KIMI_VL_PROGRAM", "scripts/serve"), description="Serve the Cog HTTP API without Docker."
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    parser.add_argument("--port", type=_port, default=5000, help="port to listen on (5000)")
    parser.add_argument("--concurrent", action="store_true", help="32 requests at a time in shared batches")
    arguments = parser.parse_args()
    interrupt_on_signals()
    try:
        environment = model_environment(os.environ, say)
        server = Server(
            environment=environment,
            host=arguments.host,
            port=arguments.port,
            log=say,
            concurrent=arguments.concurrent,
        )
        with server:
            say(f"ready: POST {server.url}/predictions (Ctrl-C stops)")
            try:
                return server.wait()
            except KeyboardInterrupt:
                say("stopping: requests in flight are finished first, Ctrl-C again ends them")
                assert server.process is not None
                server.process.terminate()
                server.wait()
                return 0
    except KeyboardInterrupt:
        return 130
    except (ServerError, schema.SchemaError) as error:
        say(f"error: {error}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
