"""The requests of a batch: lines of a file, or one for each picture of a folder. Read one by one, never all at once.

A line is known by the digest of its bytes, wherever it stands: that is how a run finds what an earlier one has done.
Where nothing else tells it from others, its number counts, too.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..serving.protocol import json_value

MAX_LINE = 160 << 20
"""Bytes; a body of the server may have 100 MiB, and a picture in it a third more as base64."""
MAX_CUSTOM_ID = 4096
URL = "/v1/chat/completions"
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"})


class LineError(Exception):
    """A line that is no request: ``code`` is one word, and the text one sentence that says what to do."""

    def __init__(self, code: str, sentence: str):
        super().__init__(sentence)
        self.code = code


@dataclass(frozen=True)
class Line:
    """A request as it was read: its number from 1 on, the digest of its bytes, and its body, or what is wrong."""

    number: int
    digest: int
    custom_id: str | None
    body: Any = None
    error: LineError | None = None


def digest(data: bytes) -> int:
    """64 bits that stand for ``data``."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


class FileLines:
    """The lines of a ``file`` of ``size`` bytes (None: nobody knows) that are not blank."""

    def __init__(self, file: BinaryIO, size: int | None):
        self._file, self._size = file, size
        self._count = 0

    def __iter__(self) -> Iterator[Line]:
        number = 0
        while data := self._file.readline(MAX_LINE + 1):
            number += 1
            stripped = (data.removeprefix(codecs.BOM_UTF8) if number == 1 else data).strip()
            if len(data) > MAX_LINE and not data.endswith(b"\n"):
                self._count += 1
                yield self._too_long(number)
            elif stripped:
                self._count += 1
                yield parse(number, stripped)

    def total(self) -> float | None:
        """How many lines there are, judged by those that were read."""
        if self._size is None or not self._count:
            return None
        return self._count * self._size / max(1, self._file.tell())

    def _too_long(self, number: int) -> Line:
        while (rest := self._file.readline(1 << 20)) and not rest.endswith(b"\n"):
            pass
        error = LineError("line_too_long", f"a line may have {MAX_LINE >> 20} MiB; send fewer or smaller images.")
        return Line(number, digest(b"too long: %d" % number), None, error=error)


class FolderLines:
    """A request for each picture in ``folder`` and below it, by their names; ``body`` has what all of them say."""

    def __init__(self, folder: Path, prompt: str, system: str | None, body: Mapping[str, Any]):
        self._folder, self._prompt, self._body = folder, prompt, body
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self._count = sum(1 for _ in pictures(folder))

    def __iter__(self) -> Iterator[Line]:
        for number, path in enumerate(pictures(self._folder), 1):
            name = path.relative_to(self._folder).as_posix()
            content = [{"type": "image_url", "image_url": {"url": name}}, {"type": "text", "text": self._prompt}]
            messages = [*self._system, {"role": "user", "content": content}]
            line = {"custom_id": name, "method": "POST", "url": URL, "body": {**self._body, "messages": messages}}
            yield parse(number, json.dumps(line).encode())

    def total(self) -> float | None:
        return self._count


def pictures(folder: Path) -> Iterator[Path]:
    """The picture files in ``folder`` and below it, by their names' endings."""
    for place, folders, names in os.walk(folder):
        folders.sort()
        yield from (Path(place, name) for name in sorted(names) if Path(name).suffix.lower() in SUFFIXES)


def parse(number: int, data: bytes) -> Line:
    """A line's request. What is wrong with it is in the result."""
    custom_id = None
    try:
        value = _json(data)
        custom_id = _custom_id(value)
        if value.get("method") != "POST":
            raise LineError("invalid_method", "method must be POST.")
        if value.get("url") != URL:
            raise LineError("invalid_url", f"url must be {URL}.")
        if not isinstance(value.get("body"), dict):
            raise LineError("invalid_body", "body must be an object.")
        return Line(number, digest(data), custom_id, value["body"])
    except LineError as error:
        known_by = data if custom_id is not None else b"%d %s" % (number, data)  # which the error names
        return Line(number, digest(known_by), custom_id, error=error)


def _json(data: bytes) -> dict[str, Any]:
    try:
        value = json_value(data.decode("utf-8"))
    except ValueError:
        raise LineError("invalid_json", "the line is not valid JSON in UTF-8; correct it.") from None
    if not isinstance(value, dict):
        raise LineError("invalid_json", "the line must be a JSON object.")
    return value


def _custom_id(value: dict[str, Any]) -> str:
    custom_id = value.get("custom_id")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_CUSTOM_ID:
        raise LineError("invalid_custom_id", f"custom_id must be a text of 1 to {MAX_CUSTOM_ID:,} characters.")
    return custom_id
