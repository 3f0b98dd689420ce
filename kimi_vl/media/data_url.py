"""Data URLs (RFC 2397) to bytes, as browsers and clients write them: one decoder for all callers.

Strict where data would be guessed, lenient in spelling: see :func:`decode`.
"""

from __future__ import annotations

import base64
import dataclasses
import email.message
import io
import re
import urllib.request
import urllib.response

import numpy as np

from ..errors import UserError
from .kinds import DOCUMENT, IMAGE, VIDEO, Kind

_PART_BYTES = 2**20
_CHARACTERS_A_BYTE = 5
"""Of a URL, at most: base64 with every character percent-encoded takes four, and line breaks some more."""
_NOT_HEX = 255
_HEX = np.full(256, _NOT_HEX, dtype=np.uint8)
_HEX[list(b"0123456789ABCDEFabcdef")] = [*range(16), *range(10, 16)]
_URL_SAFE = bytes.maketrans(b"-_", b"+/")
_SPACE = b" \t\n\r\f\v"


def is_data_url(text: str) -> bool:
    """Whether ``text`` has the scheme of a data URL, in any case, after optional white space."""
    return re.match(r"\s*data:", text, re.IGNORECASE | re.ASCII) is not None


def decode(url: str, kind: Kind = IMAGE) -> bytes:
    """The data of ``url``, at least one byte and at most as many as a file of its kind may have.

    The scheme and ``;base64`` count in any case, the latter anywhere among the parameters; what else the header says
    is ignored, and so is a fragment. Percent-encoding is resolved. In base64 white space and padding do not count
    and both alphabets are read; without ``;base64`` the data is the percent-decoded rest.

    Raises :class:`UserError` with the codes of the kind: E_IMAGE_SOURCE where it is no data URL, E_IMAGE_TOO_LARGE,
    before anything is decoded, where there is too much of it, E_IMAGE_UNREADABLE where it is broken or empty.
    """
    if not is_data_url(url):
        raise UserError(kind.source, f"give {kind.noun} as a data URL; nothing is fetched for a caller.")
    if len(url) > _CHARACTERS_A_BYTE * kind.max_bytes:
        raise kind.too_many_bytes()
    header, comma, rest = url.strip().partition("#")[0].partition(",")
    if not comma:
        raise UserError(kind.unreadable, f"write the data URL of {kind.noun} as data:{kind.example};base64,….")
    parameters = [parameter.strip().lower() for parameter in header.split(";")[1:]]
    data = _percent_decoded(rest.encode("utf-8", "replace"))
    if "base64" in parameters:
        data = _base64_decoded(data, kind)
    if len(data) > kind.max_bytes:
        raise kind.too_many_bytes()
    if not data:
        raise UserError(kind.unreadable, f"the data URL of {kind.noun} is empty; send the file again.")
    return data


def declared_kind(url: str) -> Kind:
    """What the media type in the header of ``url`` says; an image that may be as large as any file where it is silent.

    For errors and limits while nobody knows which input the data is for; what it is, its content tells.
    """
    media_type = url[:200].lstrip()[len("data:") :].partition(",")[0].partition(";")[0].strip().lower()
    if media_type.startswith("image/"):
        return IMAGE
    if media_type.startswith("video/"):
        return VIDEO
    return DOCUMENT if media_type == DOCUMENT.example else dataclasses.replace(IMAGE, max_bytes=VIDEO.max_bytes)


def install() -> None:
    """Make ``urllib.request.urlopen`` read data URLs with :func:`decode`, in this process.

    Cog opens the data URL of a file input in this way before it calls ``predict``; Python's own handler takes
    ``;BASE64`` for no base64 and drops ``-`` and ``_`` without a word.
    """
    urllib.request.install_opener(urllib.request.build_opener(_Handler))


class _Handler(urllib.request.DataHandler):
    def data_open(self, req: urllib.request.Request) -> urllib.response.addinfourl:
        data = decode(req.full_url, declared_kind(req.full_url))
        headers = email.message.Message()
        headers["Content-Type"] = "application/octet-stream"  # what it is, its content tells
        headers["Content-Length"] = str(len(data))
        return urllib.response.addinfourl(io.BytesIO(data), headers, "data:")


def _percent_decoded(text: bytes) -> bytes:
    """``text`` with each ``%`` and two hexadecimal digits made a byte, part by part to bound the memory."""
    if b"%" not in text:
        return text
    parts = []
    at = 0
    while at < len(text):
        end = at + _PART_BYTES
        cut = text.rfind(b"%", end - 2, end)  # a percent sign keeps its digits
        end = cut if cut > 0 else end
        codes = np.frombuffer(text[at:end], dtype=np.uint8)
        high, low = _HEX[codes[1:-1]], _HEX[codes[2:]]
        signs = np.flatnonzero((codes[:-2] == ord("%")) & (high != _NOT_HEX) & (low != _NOT_HEX))
        decoded = codes.copy()
        decoded[signs] = high[signs] * 16 + low[signs]
        kept = np.ones(len(codes), dtype=bool)
        kept[signs + 1] = kept[signs + 2] = False
        parts.append(decoded[kept].tobytes())
        at = end
    return b"".join(parts)


def _base64_decoded(text: bytes, kind: Kind) -> bytes:
    text = text.translate(_URL_SAFE, _SPACE).rstrip(b"=")
    if len(text) * 3 // 4 > kind.max_bytes:
        raise kind.too_many_bytes()
    try:
        return base64.b64decode(text + b"=" * (-len(text) % 4), validate=True)
    except ValueError:
        raise UserError(
            kind.unreadable, f"the data URL of {kind.noun} is not valid base64; encode the file again."
        ) from None
