"""Embedded ICC profiles are converted to sRGB, before anything else is done with the colours."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import icc_profiles
import numpy as np
import pytest
from image_corpus import chunk, png, png_rows, saved, segment
from PIL import Image, ImageCms

from kimi_vl.media import icc, image_files, images
from kimi_vl.media.images import ImageOptions

OPTIONS = ImageOptions(14, 4096, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
LEVELS = np.array([0, 30, 64, 128, 200, 255], dtype=np.uint8)
GRID = np.stack(np.meshgrid(LEVELS, LEVELS, LEVELS), axis=-1).reshape(12, 18, 3)
PICTURE = Image.fromarray(GRID)
ADOBE = icc_profiles.matrix(icc_profiles.ADOBE, 563 / 256)
P3 = icc_profiles.matrix(icc_profiles.DISPLAY_P3, icc_profiles.SRGB_CURVE)
IN_SRGB = {
    ADOBE: icc_profiles.to_srgb(GRID, icc_profiles.ADOBE, 563 / 256),
    P3: icc_profiles.to_srgb(GRID, icc_profiles.DISPLAY_P3, icc_profiles.SRGB_CURVE),
}


def loaded(source: Any) -> np.ndarray:
    return np.asarray(images.load(source, OPTIONS)).astype(int)


def far(ours: np.ndarray, expected: Any) -> int:
    return int(np.abs(ours - expected).max())


@pytest.mark.parametrize("profile", IN_SRGB, ids=["Adobe RGB", "Display P3"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("WEBP", {"lossless": True}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("JPEG", {"quality": 100, "subsampling": 0, "keep_rgb": True}),
    ],
    ids=lambda value: str(value),
)
def test_wide_colours_become_srgb(profile: bytes, kind: str, options: dict[str, Any]) -> None:
    data = saved(PICTURE, kind, icc_profile=profile, **options)
    tolerance = 6 if kind == "JPEG" else 2
    plain = loaded(saved(PICTURE, kind, **options))
    assert far(plain, GRID) <= (3 if kind == "JPEG" else 0)
    assert far(IN_SRGB[profile], GRID) > 30
    assert np.abs(loaded(data) - IN_SRGB[profile]).mean() < 2
    assert far(loaded(data), IN_SRGB[profile]) <= (40 if kind == "JPEG" else tolerance)
    assert far(loaded(Image.open(io.BytesIO(data))), loaded(data)) == 0


def test_the_same_red_on_every_screen() -> None:
    """The red of sRGB written in Display P3 is (234, 51, 35)."""
    red = Image.new("RGB", (30, 30), (234, 51, 35))
    assert far(loaded(saved(red, "PNG", icc_profile=P3)), (255, 0, 0)) <= 2


def test_a_long_profile_in_pieces_of_a_jpeg() -> None:
    padded = ADOBE + bytes(200_000)
    data = saved(PICTURE, "JPEG", quality=100, subsampling=0, keep_rgb=True, icc_profile=padded)
    assert data.count(b"ICC_PROFILE\0") > 1
    assert image_files.read(data).profile == padded  # pyright: ignore[reportOptionalMemberAccess]
    plain = saved(PICTURE, "JPEG", quality=100, subsampling=0, keep_rgb=True)
    half = len(ADOBE) // 2
    pieces = [b"ICC_PROFILE\0\2\2" + ADOBE[half:], b"ICC_PROFILE\0\1\2" + ADOBE[:half]]
    turned = plain[:2] + b"".join(segment(0xE2, piece) for piece in pieces) + plain[2:]
    assert far(loaded(turned), loaded(data)) == 0


def test_a_bitmap_with_a_profile() -> None:
    pixels = GRID[::-1, :, ::-1].tobytes() + b""
    rows = b"".join(pixels[at : at + 54] + b"\0\0" for at in range(0, len(pixels), 54))
    header = struct.pack("<IiiHHIIiiII", 124, 18, 12, 1, 24, 0, 0, 0, 0, 0, 0).ljust(56, b"\0") + b"DEBM"
    header = header.ljust(112, b"\0") + struct.pack("<III", 124 + len(rows), len(ADOBE), 0)
    data = b"BM" + struct.pack("<IHHI", 0, 0, 0, 14 + 124) + header + rows + ADOBE
    assert len(header) == 124
    assert far(loaded(data), IN_SRGB[ADOBE]) <= 2
    assert far(loaded(data.replace(b"DEBM", b"KNIL")), GRID) == 0


def test_colours_are_converted_before_they_are_laid_over_white() -> None:
    alpha = np.linspace(0, 255, 12).astype(np.uint8)[:, None].repeat(18, axis=1)
    image = PICTURE.copy()
    image.putalpha(Image.fromarray(alpha))
    share = alpha[..., None] / 255
    expected = IN_SRGB[ADOBE] * share + 255 * (1 - share)
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True}), ("TIFF", {})):
        assert far(loaded(saved(image, kind, icc_profile=ADOBE, **options)), expected) <= 3
    # the other order would be told apart
    late = icc_profiles.to_srgb(GRID * share + 255 * (1 - share), icc_profiles.ADOBE, 563 / 256)
    assert far(late, expected) > 10


def test_palettes_and_clear_colours() -> None:
    few = Image.fromarray(GRID[:1, :16].repeat(12, axis=0)).quantize(16)
    expected = icc_profiles.to_srgb(np.asarray(few.convert("RGB")), icc_profiles.ADOBE, 563 / 256)
    assert far(loaded(saved(few, "PNG", icc_profile=ADOBE)), expected) <= 2
    first = few.getpixel((0, 0))
    expected[np.asarray(few) == first] = 255
    assert far(loaded(saved(few, "PNG", icc_profile=ADOBE, transparency=first)), expected) <= 2


def test_grey_profiles() -> None:
    ramp = np.arange(256, dtype=np.uint8)[None].repeat(8, axis=0)
    expected = icc_profiles.encoded(ramp / 255)[..., None]
    profile = icc_profiles.grey(1.0)
    assert far(expected[..., 0], ramp) > 60
    for kind in ("PNG", "TIFF", "JPEG"):
        options = {"quality": 100} if kind == "JPEG" else {}
        ours = loaded(saved(Image.fromarray(ramp), kind, icc_profile=profile, **options))
        assert far(ours, expected) <= (14 if kind == "JPEG" else 1)
    deep = Image.fromarray(ramp.astype(np.uint16) * 257)
    assert far(loaded(saved(deep, "PNG", icc_profile=profile)), expected) <= 2
    alpha = Image.merge("LA", [Image.fromarray(ramp), Image.new("L", (256, 8), 128)])
    mixed = expected * (128 / 255) + 255 * (127 / 255)
    assert far(loaded(saved(alpha, "PNG", icc_profile=profile)), mixed) <= 2


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_inks(kind: str) -> None:
    for ink, light in (((0, 0, 0, 0), 100), ((0, 0, 0, 255), 0), ((0, 0, 0, 128), 49.8), ((255, 0, 0, 0), 75)):
        picture = Image.new("CMYK", (32, 32), ink)
        level = icc_profiles.encoded(np.array(((light + 16) / 116) ** 3 if light > 8 else light / 903.3))
        ours = loaded(saved(picture, kind, icc_profile=icc_profiles.inks()))
        assert far(ours, level) <= 3, ink
    assert far(loaded(saved(Image.new("CMYK", (32, 32), (255, 0, 0, 0)), kind)), (0, 255, 255)) <= 3


def test_srgb_by_any_name_changes_no_pixel() -> None:
    built = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    by_hand = icc_profiles.matrix(icc_profiles.SRGB, icc_profiles.SRGB_CURVE)
    for profile in (built, by_hand):
        assert icc.read(profile) is None
        assert far(loaded(saved(PICTURE, "PNG", icc_profile=profile)), GRID) == 0
    assert icc.read(icc_profiles.grey(icc_profiles.SRGB_CURVE)) is None
    assert icc.read(icc_profiles.matrix(icc_profiles.SRGB, 1.8)) is not None


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_a_profile_of_another_kind_of_picture_is_left_out(mode: str) -> None:
    picture = PICTURE.convert(mode)
    kind = "TIFF"
    plain = loaded(saved(picture, kind))
    for own, profile in (("RGB", ADOBE), ("L", icc_profiles.grey(1.0)), ("CMYK", icc_profiles.inks())):
        changed = far(loaded(saved(picture, kind, icc_profile=profile)), plain) > 3
        assert changed == (own == mode)


def test_profiles_that_are_left_out() -> None:
    useful = icc_profiles.matrix(icc_profiles.ADOBE, 2.2)
    assert icc.read(useful) is not None
    assert icc.read(icc_profiles.matrix(icc_profiles.ADOBE, 2.2, {b"text": b"mpet" + bytes(12)})) is not None
    for bad in (
        b"",
        icc_profiles.matrix(icc_profiles.ADOBE, 2.2, {b"D2B3": b"mpet" + bytes(12)}),
        icc_profiles.matrix(icc_profiles.ADOBE, 2.2, {b"B2D0": b"mpet" + bytes(12)}),
        useful.replace(b"mntr", b"link"),
        useful.replace(b"mntr", b"abst"),
        useful.replace(b"RGB ", b"7CLR", 1),
        useful.replace(b"acsp", b"none"),
        useful[:300],
        useful + bytes(icc.MAX_BYTES),
    ):
        assert icc.read(bad) is None
        assert far(loaded(saved(PICTURE, "TIFF", icc_profile=bad)), GRID) == 0


def test_a_profile_that_unpacks_without_end_is_left_out() -> None:
    bomb = b"x\0\0" + zlib.compress(ADOBE + bytes(64 * 2**20))
    data = png((18, 12), png_rows(GRID, 8), before=chunk(b"iCCP", bomb))
    assert image_files.read(data).profile == b""  # pyright: ignore[reportOptionalMemberAccess]
    assert far(loaded(data), GRID) == 0
    good = png((18, 12), png_rows(GRID, 8), before=chunk(b"iCCP", b"x\0\0" + zlib.compress(ADOBE)))
    assert far(loaded(good), IN_SRGB[ADOBE]) <= 2
