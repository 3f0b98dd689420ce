"""What a picture leaves open is white: the rest of a canvas behind a small first frame, and what is transparent."""

from __future__ import annotations

import io
import itertools
import struct
from typing import Any

import numpy as np
import pytest
from image_corpus import saved
from PIL import Image

from kimi_vl.media import images
from kimi_vl.media.images import ImageOptions

OPTIONS = ImageOptions(14, 4096, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
CANVAS = (40, 30)
FRAME = Image.fromarray(np.random.default_rng(3).integers(0, 2, (9, 12), dtype=np.uint8) * 255).convert("RGB")
PLACES = list(itertools.product((0, 5, CANVAS[0] - FRAME.width), (0, 7, CANVAS[1] - FRAME.height)))


def loaded(source: Any) -> Image.Image:
    return images.load(source, OPTIONS)


def expected(place: tuple[int, int], canvas: tuple[int, int] = CANVAS) -> bytes:
    picture = Image.new("RGB", canvas, "white")
    picture.paste(FRAME, place)
    return picture.tobytes()


def gif(
    place: tuple[int, int],
    canvas: tuple[int, int] = CANVAS,
    disposal: int = 0,
    clear: bool = False,
    local: bool = False,
    background: int = 0,
    frames: int = 1,
) -> bytes:
    """A GIF whose first frame lies at ``place`` of a canvas. Its colour 0 is black, so that open ground would show."""
    few = FRAME.quantize(2)
    plain = saved(few, "GIF")
    colours = plain[13 : 13 + 6]
    body = plain[plain.index(b",", 19) : -1]
    start = 10 + (6 if body[9] & 128 else 0)
    body = body[start:]
    header = b"GIF89a" + struct.pack("<HHBBB", *canvas, 0 if local else 128, background, 0)
    control = b"!\xf9\4" + struct.pack("<BHBB", disposal << 2 | clear, 5, 3 if clear else 0, 0)
    flags = 128 if local else 0
    frame = control + b"," + struct.pack("<HHHHB", *place, *FRAME.size, flags) + (colours if local else b"") + body
    return header + (b"" if local else colours) + frame * frames + b";"


@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("disposal", [0, 1, 2, 3])
def test_a_gif_s_first_frame_on_a_larger_canvas(place: tuple[int, int], disposal: int) -> None:
    for local, clear, frames, background in itertools.product((False, True), (False, True), (1, 2), (0, 1)):
        data = gif(place, CANVAS, disposal, clear, local, background, frames)
        picture = loaded(data)
        assert picture.size == CANVAS
        assert picture.tobytes() == expected(place)
        assert loaded(Image.open(io.BytesIO(data))).tobytes() == picture.tobytes()


def test_a_gif_s_frame_that_covers_or_exceeds_its_canvas() -> None:
    assert loaded(gif((0, 0), FRAME.size)).tobytes() == FRAME.tobytes()
    larger = loaded(gif((30, 25)))
    assert larger.size == (42, 34)
    assert larger.tobytes() == expected((30, 25), (42, 34))
    assert loaded(gif((0, 0), (0, 0))).tobytes() == FRAME.tobytes()


def test_a_later_frame_of_an_open_gif_is_as_pillow_shows_it() -> None:
    opened = Image.open(io.BytesIO(gif((5, 7), frames=2)))
    opened.seek(1)
    assert loaded(opened).size == CANVAS


def webp(place: tuple[int, int], flags: int, blend: int, frames: int = 1, alpha: int = 255) -> bytes:
    """An animated WebP whose frames lie at ``place``; its background colour is black."""

    def three(*values: int) -> bytes:
        return b"".join(struct.pack("<I", value)[:3] for value in values)

    image = FRAME.convert("RGBA")
    image.putalpha(alpha)
    stored = image if alpha < 255 else FRAME
    picture = saved(stored, "WEBP", lossless=True, exact=True)[12:]
    if picture.startswith(b"VP8X"):
        picture = picture[18:]
    head = three(place[0] // 2, place[1] // 2, FRAME.width - 1, FRAME.height - 1, 50) + bytes([blend])
    frame = head + picture
    frame = b"ANMF" + struct.pack("<I", len(frame)) + frame
    extended = b"VP8X" + struct.pack("<I", 10) + bytes([flags, 0, 0, 0]) + three(CANVAS[0] - 1, CANVAS[1] - 1)
    body = b"WEBP" + extended + b"ANIM" + struct.pack("<I", 6) + b"\0\0\0\xff\0\0" + frame * frames
    return b"RIFF" + struct.pack("<I", len(body)) + body


@pytest.mark.parametrize("place", [(0, 0), (6, 8), (28, 20)], ids=str)
@pytest.mark.parametrize("flags", [2, 2 | 16], ids=["opaque", "alpha"])
@pytest.mark.parametrize("blend", range(4))
def test_an_animated_webp_s_first_frame_on_a_larger_canvas(place: tuple[int, int], flags: int, blend: int) -> None:
    for frames in (1, 2):
        picture = loaded(webp(place, flags, blend, frames))
        assert picture.size == CANVAS
        assert picture.tobytes() == expected(place)


def test_a_half_clear_frame_of_a_webp_is_laid_over_white() -> None:
    picture = np.asarray(loaded(webp((6, 8), 2 | 16, 0, alpha=128))).astype(int)
    white = np.asarray(Image.frombytes("RGB", CANVAS, expected((6, 8)))).astype(int)
    assert np.abs(picture - (white * 128 + 255 * 127) / 255).max() <= 1


MASKS = {
    "BGRA": (0xFF0000, 0xFF00, 0xFF, 0xFF000000),
    "RGBA": (0xFF, 0xFF00, 0xFF0000, 0xFF000000),
    "ABGR": (0xFF000000, 0xFF0000, 0xFF00, 0xFF),
}


def bmp(pixels: np.ndarray, masks: tuple[int, ...], header: int, compression: int = 3, up: bool = False) -> bytes:
    """A bitmap of 32 bits of pixels ``(H, W, 4)``, red, green, blue, alpha."""
    shifts = [(mask & -mask).bit_length() - 1 for mask in masks]
    words = sum((pixels[..., i].astype(np.uint64) << shift for i, shift in enumerate(shifts)), np.uint64(0))
    rows = np.asarray(words).astype("<u4")
    rows = rows if up else rows[::-1]
    height, width = pixels.shape[:2]
    info = struct.pack("<IiiHHIIiiII", header, width, -height if up else height, 1, 32, compression, 0, 0, 0, 0, 0)
    info = (info + struct.pack("<4I", *masks)).ljust(header, b"\0")[:header]
    return b"BM" + struct.pack("<IHHI", 0, 0, 0, 14 + len(info)) + info + rows.tobytes()


@pytest.mark.parametrize("header", [56, 108, 124], ids=["V3", "V4", "V5"])
@pytest.mark.parametrize("order", MASKS)
@pytest.mark.parametrize("up", [False, True])
def test_an_empty_alpha_channel_of_a_bitmap_counts_as_none(header: int, order: str, up: bool) -> None:
    pixels = np.random.default_rng(7).integers(0, 256, (9, 12, 4), dtype=np.uint8)
    for alpha, share in ((0, 1.0), (255, 1.0), (64, 64 / 255)):
        pixels[..., 3] = alpha
        ours = np.asarray(loaded(bmp(pixels, MASKS[order], header, up=up))).astype(int)
        assert np.abs(ours - (pixels[..., :3] * share + 255 * (1 - share))).max() <= 1, alpha
    pixels[..., 3] = 0
    pixels[4, 5, 3] = 255  # one opaque pixel gives the rest its meaning
    ours = np.asarray(loaded(bmp(pixels, MASKS[order], header, up=up))).astype(int)
    shown = np.full((9, 12, 3), 255)
    shown[4, 5] = pixels[4, 5, :3]
    assert (ours == shown).all()


@pytest.mark.parametrize("header", [40, 108, 124])
def test_a_bitmap_without_masks_has_no_alpha(header: int) -> None:
    pixels = np.random.default_rng(7).integers(0, 256, (9, 12, 4), dtype=np.uint8)
    assert (np.asarray(loaded(bmp(pixels, MASKS["BGRA"], header, 0))) == pixels[..., :3]).all()


def test_clear_pixels_of_other_formats_stay_white() -> None:
    clear = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True}), ("TIFF", {})):
        assert set(loaded(saved(clear, kind, **options)).tobytes()) == {255}


@pytest.mark.parametrize(
    "masks",
    [(0xF800, 0x7E0, 0x1F, 0), (0x7C00, 0x3E0, 0x1F, 0), (0x7C00, 0x3E0, 0x1F, 0x8000)],
    ids=["565", "555", "1555"],
)
@pytest.mark.parametrize("header", [56, 108, 124], ids=["V3", "V4", "V5"])
def test_a_bitmap_of_16_bits_with_an_empty_alpha_channel(masks: tuple[int, ...], header: int) -> None:
    words = np.random.default_rng(9).integers(0, 2**16, (9, 12)).astype("<u2") & (masks[0] | masks[1] | masks[2])
    info = struct.pack("<IiiHHIIiiII", header, 12, 9, 1, 16, 3, 0, 0, 0, 0, 0) + struct.pack("<4I", *masks)
    info = info.ljust(header, b"\0")
    data = b"BM" + struct.pack("<IHHI", 0, 0, 0, 14 + header) + info + words[::-1].tobytes()
    shown = np.stack([(words & mask) / mask * 255 for mask in masks[:3]], axis=-1)
    assert np.abs(np.asarray(loaded(data)).astype(int) - shown).max() <= 1
