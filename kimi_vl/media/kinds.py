"""Kinds of files that a request may bring: their limits, the codes of their errors, and how to tell them by content."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UserError
from . import image_files

MAX_BYTES = 100 * 2**20
"""Of a video or a document."""
HEAD_BYTES = 1024
"""As much of a file as :func:`of` looks at."""


@dataclass(frozen=True)
class Kind:
    """``noun`` is what the sentences of errors call it, ``example`` a media type; the codes are those of its errors."""

    noun: str
    example: str
    max_bytes: int
    source: str
    unreadable: str
    too_large: str

    def too_many_bytes(self) -> UserError:
        return UserError(
            self.too_large, f"{self.noun} file is larger than {self.max_bytes // 2**20} MiB; send a smaller one."
        )


IMAGE = Kind(
    "an image", "image/png", image_files.MAX_BYTES, "E_IMAGE_SOURCE", "E_IMAGE_UNREADABLE", "E_IMAGE_TOO_LARGE"
)
VIDEO = Kind("a video", "video/mp4", MAX_BYTES, "E_VIDEO_SOURCE", "E_VIDEO_UNREADABLE", "E_VIDEO_TOO_LARGE")
DOCUMENT = Kind(
    "a document",
    "application/pdf",
    MAX_BYTES,
    "E_DOCUMENT_SOURCE",
    "E_DOCUMENT_UNREADABLE",
    "E_DOCUMENT_TOO_LARGE",
)

_STILL_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")


def of(head: bytes) -> Kind | None:
    """The kind of a file that begins so; None for what is neither."""
    if image_files.is_image(head) or (head[4:8] == b"ftyp" and head[8:12] in _STILL_BRANDS):
        return IMAGE
    if head[4:8] in _BOXES or head.startswith(b"\x1aE\xdf\xa3") or (head[:4], head[8:12]) == (b"RIFF", b"AVI "):
        return VIDEO
    return DOCUMENT if b"%PDF-" in head[:HEAD_BYTES] else None
