"""Ready messages that ask where something is, in forms that :func:`kimi_vl.grounding` reads.

The formats are those that Kimi-VL's makers evaluate it with; the wording is this project's, and not measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_GUI = (
    "You control a computer by its screen. You get a task and a screenshot, and take the next step towards the task.\n"
    "Answer in this form:\n## Action:\nwhat you do, in one sentence\n"
    "## Code:\n```python\npyautogui.click(x=0.5, y=0.5)\n```\n"
    "Coordinates are fractions of the screenshot's width and height, between 0 and 1."
)


def click(instruction: str) -> list[dict[str, Any]]:
    """Messages that ask for a click on a screenshot, which is the one bare image; greedy sampling is usual for it."""
    return [
        {"role": "system", "content": _GUI},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"## Task:\n{instruction}"}]},
    ]


def detect(labels: Sequence[str] | str) -> list[dict[str, Any]]:
    """Messages that ask for the boxes of what ``labels`` name in one bare image.

    The published model is not made for detecting objects in general; small or many ones are often missed.
    """
    wanted = labels if isinstance(labels, str) else ", ".join(labels)
    text = (
        f"Find every {wanted} in the image. Answer with a JSON list in a ```json block, an object for each: "
        '{"bbox_2d": [x1, y1, x2, y2], "label": "…"}, where the coordinates are fractions of the width and height of '
        "the image, between 0 and 1. Answer with an empty list if there is none."
    )
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
