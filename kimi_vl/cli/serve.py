"""``kimi-vl serve``: the OpenAI-compatible server; with ``--cog`` Cog's server, a program of its own."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import sys

from ..errors import UserError
from ..serving import options

NEEDED = ("starlette", "uvicorn", "httptools", "prometheus_client")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cog", action="store_true", help="serve Cog's HTTP API instead; its options follow")
    options.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    if arguments.cog:  # where it comes first, its program runs in place of this
        raise UserError("E_PARAMETER", "--cog comes first: kimi-vl serve --cog …")
    if any(importlib.util.find_spec(name) is None for name in NEEDED):
        raise UserError("E_PARAMETER", 'the server is not installed; pip install "kimi-vl[server]" adds it')
    try:
        chosen = settled(options.gather(arguments))
        from ..serving import server
        from ..serving.access import JsonLines

        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(JsonLines())
        logging.basicConfig(level=logging.INFO, handlers=[handler])
        logging.getLogger("uvicorn").setLevel(logging.WARNING)

        return server.serve(chosen, ready=ready)
    except options.OptionError as error:
        raise UserError("E_PARAMETER", str(error)) from None


def settled(given: options.ServerOptions) -> options.ServerOptions:
    """``given`` with the model that ``auto`` stands for here."""
    import dataclasses

    import torch

    if given.model == "auto":
        gpu = torch.cuda.is_available()
        if not gpu:
            print(
                "no CUDA GPU found: answering with the demo model, not with Kimi-VL (--model chooses)", file=sys.stderr
            )
        given = dataclasses.replace(given, model="thinking" if gpu else "demo")
    if given.model == "demo" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # matrices as small as the demo's gain nothing from a second thread
    return given


def ready(address: str) -> None:
    print(f"ready: {address}/v1 (Ctrl-C stops)", file=sys.stderr, flush=True)
