"""Data URLs (RFC 2397) to bytes, as browsers and clients write them: one decoder for every entry.

Strict where data would be guessed, lenient in spelling: see :func:`decode`.
"""

from __future__ import annotations

import base64
import email.message
import io
import re
import urllib.request
import urllib.response

import numpy as np

from ..errors import UserError
from .image_files import MAX_BYTES

_PART_BYTES = 2**20
_MOST_CHARACTERS = 5 * MAX_BYTES
"""Of a URL: base64 with every character percent-encoded takes four for each byte, and line breaks some more."""
_NOT_HEX = 255
_HEX = np.full(256, _NOT_HEX, dtype=np.uint8)
_HEX[list(b"0123456789ABCDEFabcdef")] = [*range(16), *range(10, 16)]
_URL_SAFE = bytes.maketrans(b"-_", b"+/")
_SPACE = b" \t\n\r\f\v"


def is_data_url(text: str) -> bool:
    """Whether ``text`` has the scheme of a data URL, in any case and perhaps behind white space."""
    return re.match(r"\s*data:", text, re.IGNORECASE | re.ASCII) is not None


def decode(url: str) -> bytes:
    """The data of ``url``, at least one byte and at most :data:`~kimi_vl.media.image_files.MAX_BYTES`.

    The scheme and ``;base64`` count in any case, the latter anywhere among the parameters; what else the header says
    is ignored, and so is a fragment. Percent-encoding is resolved. In base64 white space and padding do not count
    and both alphabets are read; without ``;base64`` the data is the percent-decoded rest.

    Raises :class:`UserError`: E_IMAGE_SOURCE where it is no data URL, E_IMAGE_TOO_LARGE, before anything is decoded,
    where there is too much of it, E_IMAGE_UNREADABLE where it is broken or empty.
    """
    if not is_data_url(url):
        raise UserError("E_IMAGE_SOURCE", "give the image as a data URL; nothing is fetched for a caller.")
    if len(url) > _MOST_CHARACTERS:
        raise _too_large()
    header, comma, rest = url.strip().partition("#")[0].partition(",")
    if not comma:
        raise UserError("E_IMAGE_UNREADABLE", "write the data URL of an image as data:image/png;base64,….")
    parameters = [parameter.strip().lower() for parameter in header.split(";")[1:]]
    data = _percent_decoded(rest.encode("utf-8", "replace"))
    if "base64" in parameters:
        data = _base64_decoded(data)
    if len(data) > MAX_BYTES:
        raise _too_large()
    if not data:
        raise UserError("E_IMAGE_UNREADABLE", "the data URL of an image is empty; send the image again.")
    return data


def install() -> None:
    """Make ``urllib.request.urlopen`` read data URLs with :func:`decode`, in this process.

    Cog opens the data URL of a file input in this way before it calls ``predict``; Python's own handler takes
    ``;BASE64`` for no base64 and drops ``-`` and ``_`` without a word.
    """
    urllib.request.install_opener(urllib.request.build_opener(_Handler))


class _Handler(urllib.request.DataHandler):
    def data_open(self, req: urllib.request.Request) -> urllib.response.addinfourl:
        data = decode(req.full_url)
        headers = email.message.Message()
        headers["Content-Type"] = "application/octet-stream"  # what it is, its content tells
        headers["Content-Length"] = str(len(data))
        return urllib.response.addinfourl(io.BytesIO(data), headers, "data:")


def _too_large() -> UserError:
    return UserError("E_IMAGE_TOO_LARGE", f"an image file is larger than {MAX_BYTES // 2**20} MiB; send a smaller one.")


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


def _base64_decoded(text: bytes) -> bytes:
    text = text.translate(_URL_SAFE, _SPACE).rstrip(b"=")
    if len(text) * 3 // 4 > MAX_BYTES:
        raise _too_large()
    try:
        return base64.b64decode(text + b"=" * (-len(text) % 4), validate=True)
    except ValueError:
        raise UserError(
            "E_IMAGE_UNREADABLE", "the data URL of an image is not valid base64; encode the file again."
        ) from None
