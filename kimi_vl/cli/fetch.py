"""``kimi-vl fetch``: a model's verified folder."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from .. import CheckpointError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", default="thinking", help="as KIMI_VL_MODEL (thinking)")
    parser.add_argument(
        "--write-manifest", type=Path, metavar="FILE", help="write the size and SHA-256 of every file to FILE"
    )


def run(arguments: argparse.Namespace) -> int:
    from ..weights import http, resolve, verify

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    folder = resolve.resolve(arguments.model, has_gpu=True)
    if arguments.write_manifest:
        try:
            verify.write_manifest(folder, http.redact(arguments.model), arguments.write_manifest)
        except OSError as error:
            raise CheckpointError(f"{arguments.write_manifest}: cannot be written ({error.strerror})") from None
    print(folder)
    return 0
