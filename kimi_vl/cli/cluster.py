"""``kimi-vl cluster``: the OpenAI-compatible server in several replicas, on Ray Serve."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import signal
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from ..cluster import deploy, environment
from ..cluster import run as cluster
from ..cluster.options import ClusterOptions
from ..errors import UserError
from ..serving import options
from .serve import ready, settled

NEEDED = ("ray", "starlette", "uvicorn", "httptools")
DEFAULTS = ClusterOptions()
FLAGS = {
    "replicas": "engines, or the fewest of them where --max-replicas is given",
    "max_replicas": "add replicas while requests wait, up to this many",
    "gpus_per_replica": "GPUs of a replica (1; 0 for the demo model)",
    "target_ongoing": "requests a replica that autoscaling aims at (0.7 of --max-num-seqs)",
    "upscale_delay_s": "seconds of too many requests before a replica is added",
    "downscale_delay_s": "seconds of too few requests before one is removed",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for name, text in FLAGS.items():
        default = getattr(DEFAULTS, name)
        shown = text if text.endswith(")") or not default else f"{text} ({default})"
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), metavar="N", help=shown)
    parser.add_argument("--dashboard", action="store_true", help="start Ray's dashboard, on loopback")
    several = parser.add_argument_group("several machines").add_mutually_exclusive_group()
    several.add_argument(
        "--write-launcher", type=Path, metavar="FOLDER", help="write what Ray is to start as HAProxy on this machine"
    )
    several.add_argument(
        "--deploy",
        type=Path,
        metavar="FILE",
        help="deploy a configuration file of Ray Serve, and say whether it serves",
    )
    options.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    if any(importlib.util.find_spec(name) is None for name in NEEDED):
        raise UserError("E_PARAMETER", 'Ray Serve is not installed; pip install "kimi-vl[cluster]" adds it')
    try:
        if arguments.deploy:
            print(deploy.deploy(arguments.deploy), file=sys.stderr)
            return 0
        if arguments.write_launcher:
            return _write_launcher(arguments)
        given = settled(options.gather(arguments))
        chosen = {name: value for name in FLAGS if (value := getattr(arguments, name)) is not None}
        if given.model == "demo":
            chosen.setdefault("gpus_per_replica", 0.0)
            os.environ.setdefault("OMP_NUM_THREADS", "1")
        wanted = ClusterOptions(**chosen, dashboard=arguments.dashboard)
        given = _with_a_free_port(given)
        _fetch(given.model)
        with tempfile.TemporaryDirectory(prefix="kimi-vl-", dir="/tmp") as folder:
            told = environment.everywhere(given) | environment.one_machine(given, Path(folder))
            os.environ |= told | os.environ
            return cluster.serve(given, wanted, ready, _signals)
    except options.OptionError as error:
        raise UserError("E_PARAMETER", str(error)) from None


def _write_launcher(arguments: argparse.Namespace) -> int:
    try:
        print(environment.write_launcher(options.gather(arguments), arguments.write_launcher))
    except OSError as error:
        raise options.OptionError(f"{arguments.write_launcher}: cannot be written ({error.strerror})") from None
    return 0


def _with_a_free_port(given: options.ServerOptions) -> options.ServerOptions:
    """``given`` with the port that 0 stands for. Raises :class:`~kimi_vl.serving.options.OptionError`."""
    from ..serving import server

    with server.listen(given) as listener:
        return dataclasses.replace(given, port=listener.getsockname()[1])


def _fetch(model: str) -> None:
    """Fetch and verify the weights once, before replicas ask for them; what is wrong with them is said here."""
    from ..weights import resolve

    resolve.resolve(model, has_gpu=True)


def _signals() -> threading.Event:
    """Is set by SIGTERM or SIGINT; a second one ends the process as usual."""
    over = threading.Event()

    def end(number: int, frame: Any) -> None:
        if over.is_set():
            raise KeyboardInterrupt
        print("ending what runs (once more: at once)", file=sys.stderr, flush=True)
        over.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    return over
