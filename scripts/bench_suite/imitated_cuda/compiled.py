"""How much shared memory kernels need, read off what Triton compiles for a card; that takes no GPU.

Kernels that are interpreted cannot be compiled in the same process, so this module is run in one of its own: a line of
JSON for each launch in, a line with its bytes out.
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any


def shared_bytes(launch: dict[str, Any]) -> int:
    """``launch`` has a ``module`` and ``kernel``, types and constants by argument, which of them are ``aligned`` to 16
    (bytes, or as numbers), ``options`` and a ``capability``."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(launch["module"]), launch["kernel"])
    places = {name: place for place, name in enumerate(kernel.arg_names)}
    constants = {(places[name],): value for name, value in launch["constants"].items()}
    types = {name: launch["types"].get(name, "constexpr") for name in kernel.arg_names}
    aligned = {(places[name],): [["tt.divisibility", 16]] for name in launch["aligned"]}
    source = ASTSource(kernel, types, constants, aligned)
    return triton.compile(source, GPUTarget("cuda", launch["capability"], 32), launch["options"]).metadata.shared


if __name__ == "__main__":
    for line in sys.stdin:
        print(shared_bytes(json.loads(line)), flush=True)
