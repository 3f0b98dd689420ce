"""A process that reads image files from its input and says what became of each; part of test_image_corpus.py.

Each request is a line of JSON with the length of a file (and perhaps a suffix, under which it is then put on disk),
and the bytes. Each reply is a line of JSON.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import resource
import sys
import tempfile
from pathlib import Path
from typing import Any

from kimi_vl.errors import UserError
from kimi_vl.media import images

HALF = (0.5, 0.5, 0.5)
OPTIONS = images.ImageOptions(14, 4096, HALF, HALF)
SPOTS = ((0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75))


def memory(name: str) -> int:
    """Bytes of memory that this process holds (VmRSS) or held at most (VmHWM)."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:  # not Linux
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(name))


def forget_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def look(source: bytes | Path) -> dict[str, Any]:
    try:
        image = images.load(source, OPTIONS)
        patches, grid = images.preprocess(image, OPTIONS)
    except UserError as error:
        return {"code": error.code, "error": str(error)}
    assert image.mode == "RGB" and patches.shape == (grid[0] * grid[1], 3, 14, 14)
    reply: dict[str, Any] = {"code": "", "size": image.size}
    reply["spots"] = [image.getpixel((int(x * image.width), int(y * image.height))) for x, y in SPOTS]
    if image.width * image.height < 100_000:
        reply["digest"] = hashlib.sha256(image.tobytes()).hexdigest()
    return reply


def main() -> None:
    look(b"GIF89a")  # what is loaded once
    for line in sys.stdin.buffer:
        request = json.loads(line)
        data = sys.stdin.buffer.read(request["length"])
        forget_peak()
        before = memory("VmRSS")
        reply: dict[str, Any] = {}
        try:
            if request["suffix"]:
                with tempfile.NamedTemporaryFile(suffix=request["suffix"]) as file:
                    file.write(data)
                    file.flush()
                    reply = look(Path(file.name))
            else:
                reply = look(data)
        except Exception as error:
            reply = {"code": "?", "error": repr(error)[:200]}
        reply["memory"] = memory("VmHWM") - before
        reply["resting"] = memory("VmRSS")
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
