"""``kimi-vl pack``: a checkpoint as one tar that the service can be pointed at."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from ..quantization.scheme import FORMS
from ..weights.progress import amount


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=Path, metavar="DIR", help="a checkpoint folder or Hugging Face cache tree")
    parser.add_argument("out", type=Path, metavar="OUT.tar", help="the file to write")
    parser.add_argument(
        "--quantize",
        choices=FORMS,
        help="quantise the weights on the way; an OUT that does not end in .tar then becomes a folder",
    )


def run(arguments: argparse.Namespace) -> int:
    from ..weights.pack import pack, pack_quantized

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if arguments.quantize:
        packed = pack_quantized(arguments.directory, arguments.out, arguments.quantize)
        if packed is None:
            print(f"{arguments.out}: weights as {arguments.quantize}; set KIMI_VL_MODEL={arguments.out}")
            return 0
    else:
        packed = pack(arguments.directory, arguments.out)
    if packed.left_out:
        print(f"left out: {', '.join(packed.left_out)}", file=sys.stderr)
    print(f"{arguments.out}: {amount(packed.size)}, revision {packed.revision}, sha256 {packed.sha256}")
    print(f"put it on a server that answers range requests and set KIMI_VL_MODEL=https://…/{arguments.out.name}")
    return 0
