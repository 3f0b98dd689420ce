"""A file of another kind in the place of an image is told where it belongs."""

from __future__ import annotations

import pytest

from kimi_vl.errors import UserError
from kimi_vl.media.images import ImageOptions, load


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"%PDF-1.7\n1 0 obj", "a document came as an image; send it as a document."),
        (b"\x00\x00\x00\x20ftypisom\x00\x00\x02\x00", "a video came as an image; send it as a video."),
        (b"\x1aE\xdf\xa3" + bytes(40), "a video came as an image; send it as a video."),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "an image is not a PNG, JPEG, WebP, GIF, BMP or TIFF file"),
        (b"\x00\x00\x00\x20ftypavif\x00\x00\x00\x00", "an image is not a PNG, JPEG, WebP, GIF, BMP or TIFF file"),
    ],
    ids=["PDF", "MP4", "Matroska", "SVG", "AVIF"],
)
def test_what_is_no_image(data: bytes, message: str) -> None:
    with pytest.raises(UserError) as refusal:
        load(data, ImageOptions(14, 4096, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)))
    assert refusal.value.code == "E_IMAGE_FORMAT" and refusal.value.message.startswith(message)
