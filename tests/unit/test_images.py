"""Sizes as the original computes them, and what becomes of the pictures people send."""

from __future__ import annotations

import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kimi_vl.errors import CheckpointError, UserError
from kimi_vl.media import image_files, images
from kimi_vl.media.images import ImageOptions

DATA = Path(__file__).parents[1] / "golden"
HALF = (0.5, 0.5, 0.5)
OPTIONS = ImageOptions(14, 4096, HALF, HALF)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def declared(width: int, height: int) -> bytes:
    """A PNG file whose header declares a size, with the data of a picture of one pixel."""
    png = encoded(Image.new("1", (1, 1)), "PNG")
    header = b"IHDR" + struct.pack(">II", width, height) + png[24:29]
    return png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]


def test_sizes_of_the_original():
    limits = json.loads((DATA / "processor_sizes.json").read_text())["limits"]
    checked = 0
    for limit, rows in limits.items():
        options = ImageOptions(14, int(limit), HALF, HALF)
        for row in rows:
            checked += 1
            if "error" in row:
                with pytest.raises(ValueError, match="exceeds the position encoding"):
                    images.plan(row["size_wh"][0], row["size_wh"][1], options)
                continue
            plan = images.plan(row["size_wh"][0], row["size_wh"][1], options)
            ours = [list(plan.resized), list(plan.padded), list(plan.grid), plan.patches, plan.tokens]
            assert ours == [row[k] for k in ("resized_wh", "padded_wh", "grid_hw", "patches", "image_tokens")]
    assert checked > 50


def test_patches_are_row_major_and_padded_with_minus_one():
    image = Image.fromarray(np.arange(30 * 20 * 3, dtype=np.uint8).reshape(30, 20, 3))
    patches, grid = images.preprocess(image, OPTIONS)
    assert grid == (4, 2)
    assert patches.shape == (8, 3, 14, 14)
    assert patches.dtype == np.float32
    pixel = np.asarray(image)[15, 17, 2] / 255 * 2 - 1
    assert patches[3, 2, 1, 3] == pytest.approx(pixel, abs=1e-6)
    assert (patches[5, :, 2:] == -1).all()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_formats_are_read_by_content(kind, tmp_path):
    data = encoded(Image.new("RGB", (40, 30), (200, 30, 30)), kind)
    path = tmp_path / "picture.txt"
    path.write_bytes(data)
    for source in (data, path, str(path)):
        image = images.load(source, OPTIONS)
        assert (image.mode, image.size) == ("RGB", (40, 30))
        assert np.abs(np.asarray(image)[15, 20].astype(int) - (200, 30, 30)).max() < 12


def test_orientation_is_applied():
    image = Image.new("RGB", (40, 20), "white")
    image.paste((255, 0, 0), (0, 0, 10, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    upright = images.load(encoded(image, "PNG", exif=exif), OPTIONS)
    assert upright.size == (20, 40)
    assert upright.getpixel((15, 5)) == (255, 0, 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_open_image_is_turned_like_its_file(orientation):
    image = Image.new("RGB", (40, 20), "white")
    image.paste((255, 0, 0), (0, 0, 10, 10))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(image, "PNG", exif=exif)
    opened = Image.open(io.BytesIO(data))
    assert images.load(opened, OPTIONS).tobytes() == images.load(data, OPTIONS).tobytes()
    assert opened.size == (40, 20)
    assert opened.getexif()[0x0112] == orientation


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "I;16", "F"])
def test_the_caller_s_image_is_left_as_it_was(mode):
    image = Image.new(mode, (30, 30))
    before = image.tobytes()
    loaded = images.load(image, OPTIONS)
    assert loaded.mode == "RGB"
    assert (image.mode, image.size, image.tobytes()) == (mode, (30, 30), before)


@pytest.mark.parametrize(
    ("image", "code"),
    [
        (
            lambda: Image.open(io.BytesIO(encoded(Image.effect_noise((200, 200), 50), "PNG")[:3000])),
            "E_IMAGE_UNREADABLE",
        ),
        (lambda: Image.new("1", (8_000, 8_000)), "E_IMAGE_TOO_LARGE"),
        (lambda: Image.new("RGB", (0, 10)), "E_IMAGE_UNREADABLE"),
    ],
    ids=["cut", "large", "empty"],
)
def test_open_images_that_cannot_be_used(image, code):
    with pytest.raises(UserError, match=code):
        images.load(image(), OPTIONS)


def test_transparency_becomes_white_and_deep_samples_are_scaled():
    clear = images.load(encoded(Image.new("RGBA", (30, 30), (255, 0, 0, 0)), "PNG"), OPTIONS)
    assert clear.getpixel((3, 3)) == (255, 255, 255)
    deep = images.load(encoded(Image.fromarray(np.full((30, 30), 51400, dtype=np.uint16)), "PNG"), OPTIONS)
    assert deep.getpixel((3, 3)) == (200, 200, 200)


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "E_IMAGE_UNREADABLE"),
        (b"<html></html>", "E_IMAGE_FORMAT"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "E_IMAGE_FORMAT"),
        (encoded(Image.new("RGB", (300, 300)), "PNG")[:90], "E_IMAGE_UNREADABLE"),
        (encoded(Image.new("RGB", (300, 300)), "ICO"), "E_IMAGE_FORMAT"),
        (declared(50_000, 50_000), "E_IMAGE_TOO_LARGE"),
        (declared(8_000, 8_000), "E_IMAGE_TOO_LARGE"),
        (declared(300, 300), "E_IMAGE_UNREADABLE"),
        (bytes(image_files.MAX_BYTES + 1), "E_IMAGE_TOO_LARGE"),
    ],
    ids=["empty", "html", "svg", "cut", "ico", "bomb", "large", "few data", "heavy"],
)
def test_what_is_no_picture_is_the_callers_error(data, code):
    with pytest.raises(UserError, match=code):
        images.load(data, OPTIONS)


def test_a_missing_file_is_the_callers_error(tmp_path):
    with pytest.raises(UserError, match="E_IMAGE_UNREADABLE") as caught:
        images.load(tmp_path / "none.png", OPTIONS)
    assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize("size", [(1, 1), (1, 900), (7_140, 20), (7_141, 20), (20, 12_000), (10_000, 10), (30_000, 3)])
def test_every_shape_has_a_plan(size):
    image = images.load(Image.new("RGB", size), OPTIONS)
    plan = images.plan(*image.size, OPTIONS)
    assert max(plan.padded) <= 7_140
    if max(size) <= 7_140:
        assert image.size == size


def test_options_are_strict(tmp_path):
    good = json.loads((DATA / "golden_a" / "checkpoint" / "preprocessor_config.json").read_text())
    for name, value in (
        ("pad_input", False),
        ("patch_size", None),
        ("in_token_limit", "9"),
        ("image_std", [1]),
    ):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(good | {name: value}))
        with pytest.raises(CheckpointError, match=rf"preprocessor_config\.json.*{name}"):
            ImageOptions.from_directory(tmp_path)
