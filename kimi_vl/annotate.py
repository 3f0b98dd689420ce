"""Draws numbered boxes and points on a picture.

Labels stay beside the picture: Pillow's own font has no letters but Latin ones.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from .text.grounding import Grounding

COLOURS = ("#e6194b", "#1f77ff", "#2ca02c", "#ff8c00", "#a11fd0", "#00a5b5", "#b8860b", "#d6207e")

MAX_SIDE = 2048


@dataclass(frozen=True)
class Mark:
    """What is drawn under one number, in pixels: a ``box`` (left, top, right, bottom), and points joined by a line."""

    box: tuple[float, float, float, float] | None = None
    points: tuple[tuple[float, float], ...] = ()


def annotated(image: Image.Image, marks: Sequence[Mark], numbers: Sequence[int] | None = None) -> Image.Image:
    """A copy of ``image`` with ``marks``, numbered from 1 on or as ``numbers`` say, in colours that take turns."""
    drawn = image.convert("RGB")
    draw = ImageDraw.Draw(drawn)
    short = min(drawn.size)
    width = max(2, round(short / 200))
    font = ImageFont.load_default(max(12, round(short / 28)))
    for index, mark in enumerate(marks):
        number = numbers[index] if numbers is not None else index + 1
        colour = COLOURS[(number - 1) % len(COLOURS)]
        at = mark.points[0] if mark.points else (0.0, 0.0)
        if mark.box is not None:
            left, top, right, bottom = mark.box
            at = (left, top)
            draw.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=colour, width=width)
        if len(mark.points) > 1:
            draw.line(mark.points, fill=colour, width=width)
        radius = 2 * width
        for x, y in mark.points:
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), outline=colour, width=width)
            draw.ellipse((x - 1, y - 1, x + 1, y + 1), fill=colour)
        _number(draw, str(number), at, drawn.size, colour, font, radius if mark.box is None else 0)
    return drawn


def _number(
    draw: ImageDraw.ImageDraw, text: str, at: tuple[float, float], size: tuple[int, int], colour, font, gap: float
):
    """The number on a ground of its colour, at ``at`` or as near to it as fits into the picture."""
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    width, height = right - left + 6, bottom - top + 6
    x = min(max(at[0] + gap, 0), max(size[0] - width, 0))
    y = min(max(at[1] + gap, 0), max(size[1] - height, 0))
    draw.rectangle((x, y, x + width, y + height), fill=colour)
    draw.text((x + 3 - left, y + 3 - top), text, fill="white", font=font)


def with_findings(image: Image.Image, found: Grounding, index: int = 0) -> Image.Image:
    """The picture that is the ``index``-th of its request with what was found in it, each under its number in order."""
    width, height = image.size
    own = [(number, each) for number, each in enumerate(found.findings, 1) if each.image == index]
    marks = []
    for _, each in own:
        box = each.relative_box
        scaled = (box[0] * width, box[1] * height, box[2] * width, box[3] * height) if box else None
        marks.append(Mark(scaled, tuple((x * width, y * height) for x, y in each.relative_points)))
    return annotated(image, marks, [number for number, _ in own])


def data_url(image: Image.Image) -> str:
    """The picture as a data URL: a JPEG of at most 2,048 pixels a side, since it travels inside of JSON."""
    small = image.copy()
    small.thumbnail((MAX_SIDE, MAX_SIDE))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")
