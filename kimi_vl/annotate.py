"""Draws numbered boxes and points on a picture. Knows pixels; not where they come from or what they are called.

Labels stay beside the picture: Pillow's own font has no letters but Latin ones.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

COLOURS = ("#e6194b", "#1f77ff", "#2ca02c", "#ff8c00", "#a11fd0", "#00a5b5", "#b8860b", "#d6207e")


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


def png(image: Image.Image) -> bytes:
    """The picture as a PNG file."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
