"""Numbered boxes and points on pictures."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from kimi_vl.annotate import COLOURS, MAX_SIDE, Mark, annotated, data_url, with_findings
from kimi_vl.media import data_url as data_urls
from kimi_vl.text.grounding import grounding


def colour(index: int) -> tuple[int, int, int]:
    text = COLOURS[index % len(COLOURS)]
    return int(text[1:3], 16), int(text[3:5], 16), int(text[5:7], 16)


def test_a_box_is_drawn_along_its_edges_and_the_original_stays() -> None:
    image = Image.new("RGB", (400, 300), "white")
    drawn = annotated(image, [Mark(box=(100, 50, 300, 200))])
    for x, y in [(299, 120), (250, 199), (100, 150), (280, 50)]:
        assert drawn.getpixel((x, y)) == colour(0)
    for x, y in [(200, 150), (300, 120), (250, 200), (99, 150), (280, 49)]:
        assert drawn.getpixel((x, y)) == (255, 255, 255)
    assert set(image.get_flattened_data()) == {(255, 255, 255)}


def test_each_mark_has_its_colour_and_number() -> None:
    image = Image.new("L", (400, 300), 255)
    drawn = annotated(image, [Mark(box=(10, 10, 100, 100)), Mark(points=((200.0, 150.0), (300.0, 250.0)))], [1, 12])
    assert drawn.mode == "RGB" and drawn.getpixel((50, 10)) == colour(0)
    assert drawn.getpixel((200, 150)) == colour(11) and drawn.getpixel((250, 200)) == colour(11)


@pytest.mark.parametrize("size", [(1, 1), (3, 500), (40, 40), (4000, 30)])
def test_numbers_stay_inside(size: tuple[int, int]) -> None:
    width, height = size
    corners = [(0.0, 0.0), (float(width), 0.0), (0.0, float(height)), (float(width), float(height))]
    marks = [Mark(points=(corner,)) for corner in corners] + [Mark(box=(0, 0, width, height))]
    drawn = annotated(Image.new("RGB", size, "white"), marks)
    assert drawn.size == size


def test_the_data_url_is_a_picture_of_bounded_size() -> None:
    image = Image.open(io.BytesIO(data_urls.decode(data_url(Image.new("RGB", (5000, 1000))))))
    assert image.format == "JPEG" and image.size == (MAX_SIDE, round(MAX_SIDE / 5))


def test_findings_are_drawn_on_their_picture_under_their_number() -> None:
    found = grounding(
        '[{"image": 2, "bbox": [0, 0, 0.5, 0.5]}, {"image": 1, "bbox": [0.5, 0.5, 1, 1]}]', [(80, 80)] * 2
    )
    first, second = (with_findings(Image.new("RGB", (160, 160)), found, index) for index in range(2))
    assert first.getpixel((159, 100)) == colour(1) and first.getpixel((79, 60)) == (0, 0, 0)
    assert second.getpixel((79, 60)) == colour(0) and second.getpixel((159, 100)) == (0, 0, 0)


def test_numbers_are_legible_in_each_corner() -> None:
    """White figures on the mark's colour are seen whole, also where the mark is at the far corner."""
    image = Image.new("RGB", (200, 200), "black")
    for corner in [(0.0, 0.0), (200.0, 200.0)]:
        drawn = annotated(image, [Mark(points=(corner,))], [8])
        assert sum(drawn.convert("L").histogram()[180:]) > 10
