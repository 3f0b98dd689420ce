"""Embedded ICC profiles: converts the samples of an image to sRGB.

Profiles are untrusted. One that is damaged, does not fit the image, or would cost more than the image itself is
ignored, and the image is taken as sRGB, as one without a profile is.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageCms

MAX_BYTES = 4 * 2**20
"""Of a profile; those of printing presses take two or three."""
LIKE_SRGB = 3
"""Levels of 255: a profile that moves no colour further is sRGB in one of its many spellings. It is left out, so that
tagged and untagged copies of a picture give the same pixels."""

_MODES = {b"RGB ": "RGB", b"GRAY": "L", b"CMYK": "CMYK"}
_KINDS = (b"mntr", b"scnr", b"prtr", b"spac")
_FAMILIES = {
    "RGB": ("RGB", "RGBA", "RGBa", "RGBX", "P", "PA", "YCbCr"),
    "L": ("1", "L", "LA", "La", "I", "F"),
    "CMYK": ("CMYK",),
}
_INTENT = ImageCms.Intent.RELATIVE_COLORIMETRIC
_FLAGS = ImageCms.Flags.BLACKPOINTCOMPENSATION


@dataclass(frozen=True)
class Profile:
    """A conversion of Pillow's ``mode`` ("RGB", "L" or "CMYK") to sRGB: a transform, or a table of 3 times 256 levels,
    which is exact for the dark greys of a linear profile."""

    mode: str
    transform: ImageCms.ImageCmsTransform
    table: list[int] | None = None

    def fits(self, mode: str) -> bool:
        """Whether an image of this Pillow mode has the kind of samples that the profile is for."""
        return mode in _FAMILIES[self.mode] or (self.mode == "L" and mode.startswith("I;16"))

    def to_srgb(self, image: Image.Image) -> Image.Image:
        """``image`` in sRGB, mode RGB. Its mode must fit, without alpha."""
        if self.table is not None:
            return Image.merge("RGB", [image.convert("L")] * 3).point(self.table)
        converted = ImageCms.applyTransform(image.convert(self.mode), self.transform)
        assert converted is not None
        return converted


def read(data: bytes) -> Profile | None:
    """The profile in ``data``; None if it is sRGB or is ignored."""
    mode = _MODES.get(data[16:20])
    if mode is None or data[12:16] not in _KINDS or len(data) > MAX_BYTES or _has_programs(data):
        return None
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(data))
        target = ImageCms.createProfile("sRGB")
        flags = _FLAGS | ImageCms.Flags.NOOPTIMIZE if mode == "L" else _FLAGS
        profile = Profile(mode, ImageCms.buildTransform(source, target, mode, "RGB", _INTENT, flags))
        probe = _probe(mode)
        colours = np.asarray(profile.to_srgb(probe)).astype(int)  # (h, w, 3)
    except Exception:  # of the colour library, about anything that is wrong with the profile
        return None
    if mode == "CMYK":
        return profile
    if np.abs(colours - np.asarray(probe.convert("RGB"))).max() <= LIKE_SRGB:
        return None
    return profile if mode == "RGB" else Profile(mode, profile.transform, colours.reshape(256, 3).T.ravel().tolist())


def _has_programs(data: bytes) -> bool:
    """Whether there are tags with chains of steps, of any number, which would run for thousands of colours."""
    tags = min(int.from_bytes(data[128:132], "big"), len(data) // 12)
    return any(data[at : at + 3] in (b"D2B", b"B2D") for at in range(132, 132 + 12 * tags, 12))


def _probe(mode: str) -> Image.Image:
    """Colours from all of the space: 256 greys, or a grid of nine levels in each channel."""
    if mode == "L":
        return Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    levels = np.linspace(0, 255, 9).round().astype(np.uint8)
    grid = np.stack(np.meshgrid(*[levels] * len(mode)), axis=-1).reshape(9, -1, len(mode))
    return Image.fromarray(grid, mode=mode)
