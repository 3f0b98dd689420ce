"""Where the bytes of a file come from: the bytes themselves, a data URL, or a path. Nothing is fetched."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import UserError
from . import data_url
from .kinds import Kind

FileSource = bytes | bytearray | str | Path


def read(source: FileSource, kind: Kind) -> bytes:
    """At least one byte, and as many as the kind allows. A text is a data URL or a path.

    Raises :class:`UserError` with the codes of the kind.
    """
    if isinstance(source, bytes | bytearray):
        data = bytes(source)
    elif isinstance(source, str) and data_url.is_data_url(source):
        data = data_url.decode(source, kind)
    else:
        data = _file(source, kind, kind.max_bytes + 1)
    if len(data) > kind.max_bytes:
        raise kind.too_many_bytes()
    if not data:
        raise UserError(kind.unreadable, f"{kind.noun} is empty; send the file again.")
    return data


def _file(path: str | Path, kind: Kind, size: int) -> bytes:
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            return file.read(size)
    except (OSError, ValueError):  # a path with a zero byte is a ValueError
        raise UserError(kind.unreadable, f"{kind.noun} file cannot be read; send it again.") from None


def _open_at_once(path: str, flags: int) -> int:
    """Opens a pipe that nobody writes to, which then reads as empty, in place of waiting for a writer for ever."""
    number = os.open(path, flags | os.O_NONBLOCK)
    os.set_blocking(number, True)
    return number
