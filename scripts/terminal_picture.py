"""Draws what `kimi-vl ask` leaves on a terminal: python scripts/terminal_picture.py > docs/images/ask.svg

The command runs on a pseudo-terminal; of the text that it prints, line ends, cleared lines and dimmed text are drawn.
"""

from __future__ import annotations

import contextlib
import os
import pty
import re
import subprocess
import sys
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHOWN = 'kimi-vl ask --seed 7 "What is the result?" images/math_problem.png'
ARGUMENTS = ["ask", "--seed", "7", "What is the result?", "images/math_problem.png"]
COLUMNS, CHARACTER, LINE, MARGIN = 88, 8.4, 20, 16

Span = tuple[str, bool]
"""A text, and whether it is dimmed."""


def output() -> str:
    """All that the command writes to a terminal, control sequences included."""
    ours, terminal = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    environment |= {
        "PYTHONPATH": str(ROOT),
        "KIMI_VL_MODEL": "auto",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-P", "-m", "kimi_vl.cli", *ARGUMENTS]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=terminal, stderr=terminal) as process:
        os.close(terminal)
        written = b""
        with contextlib.suppress(OSError):  # how Linux says that the other end is closed
            while piece := os.read(ours, 4096):
                written += piece
    os.close(ours)
    if process.returncode:
        raise SystemExit(written.decode())
    return written.decode()


def screen(text: str) -> list[list[Span]]:
    """The lines that stay on the screen, each as spans."""
    lines = []
    for line in text.replace("\r\n", "\n").rstrip("\n").split("\n"):
        spans, dim = [], False
        for piece in re.split(r"(\x1b\[[02]m)", line.rpartition("\r\x1b[K")[2]):
            if piece in ("\x1b[2m", "\x1b[0m"):
                dim = piece == "\x1b[2m"
            elif piece:
                spans.append((piece, dim))
        lines.append(spans)
    return lines


def svg(lines: list[list[Span]]) -> str:
    width, height = round(2 * MARGIN + COLUMNS * CHARACTER), 2 * MARGIN + len(lines) * LINE
    drawn = []
    for number, spans in enumerate(lines):
        inner = "".join(f'<tspan fill="#8b949e">{escape(t)}</tspan>' if dim else escape(t) for t, dim in spans)
        drawn.append(f'<text x="{MARGIN}" y="{MARGIN + number * LINE + 14}" xml:space="preserve">{inner}</text>')
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            'font-family="ui-monospace, Menlo, Consolas, \'DejaVu Sans Mono\', monospace" font-size="14" '
            'fill="#e6edf3">',
            f"<title>{escape(SHOWN)}</title>",
            f'<rect width="{width}" height="{height}" rx="8" fill="#0d1117"/>',
            *drawn,
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    sys.stdout.write(svg([[("$ " + SHOWN, False)], *screen(output())]))
