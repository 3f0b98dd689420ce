"""Fetches a model and prints its folder; the program behind `scripts/fetch_weights`."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from kimi_vl import CheckpointError, download, verify, weights

CACHE = Path(__file__).resolve().parents[1] / "model_cache"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/fetch_weights", description="Fetch and verify a model, and print its folder."
    )
    parser.add_argument("model", nargs="?", default="thinking", help="as KIMI_VL_MODEL (thinking)")
    parser.add_argument(
        "--write-manifest", type=Path, metavar="FILE", help="write the size and SHA-256 of every file to FILE"
    )
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        folder = weights.resolve(arguments.model, has_gpu=True, cache=CACHE)
        if arguments.write_manifest:
            verify.write_manifest(folder, download.redact(arguments.model), arguments.write_manifest)
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {arguments.write_manifest}: cannot be written ({error.strerror})", file=sys.stderr)
        return 1
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
