"""Reads JSON as language models write it: Python's quotes, trailing commas, cut off in the middle. Knows no meaning.

Nothing raises: a value that breaks off ends there, with the items that are whole. Each value keeps its place in the
text. A text is read in time proportional to its length.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

MAX_DEPTH = 32
MAX_WASTED = 2_000
"""Tokens that attempts may read which did not end well; without a bound, nested attempts read a text many times."""

_TOKEN = re.compile(
    r"""\s*(?:
      ([\[\]{}(),:])
    | ("(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')
    | ([-+]?(?:\d{1,18}(?:\.\d{0,18})?|\.\d{1,18})(?:[eE][-+]?\d{1,3})?(?![\w.]))
    | ([A-Za-z_]\w{0,40})
    )""",
    re.VERBOSE | re.DOTALL,
)
_MARK, _STRING, _NUMBER, _WORD = 1, 2, 3, 4  # groups of _TOKEN
_WORDS = {"true": True, "True": True, "false": False, "False": False, "null": None, "None": None}
_CLOSER = {"[": "]", "(": ")", "{": "}"}


@dataclass(slots=True)
class Value:
    """A value at ``text[begin:end]``: ``items`` of an array, ``fields`` of an object, or a ``scalar``."""

    begin: int
    end: int = 0
    items: list[Value] | None = None
    fields: dict[str, Value] | None = None
    scalar: str | float | bool | None = None
    whole: bool = field(default=True, repr=False)

    @property
    def has_fields(self) -> bool:
        """Whether it is an object, or an array with one anywhere inside."""
        return self.fields is not None or any(item.has_fields for item in self.items or ())


def values(text: str, begin: int = 0, end: int | None = None) -> Iterator[Value]:
    """The arrays and objects in ``text[begin:end]``, outermost first seen, left to right."""
    end = len(text) if end is None else end
    reader = _Reader(text, end)
    opening = re.compile(r"[\[{]")
    at = begin
    while (found := opening.search(text, at, end)) and reader.wasted < MAX_WASTED:
        before = reader.tokens
        value = reader.read(found.start(), 0)
        at = found.start() + 1
        if value is not None and (value.items or value.fields):
            yield value
            at = value.end
        if value is None or not value.whole:
            reader.wasted += reader.tokens - before


class _Reader:
    def __init__(self, text: str, end: int):
        self._text, self._end = text, end
        self.tokens = self.wasted = 0

    def _token(self, at: int) -> re.Match[str] | None:
        self.tokens += 1
        return _TOKEN.match(self._text, at, self._end)

    def read(self, at: int, depth: int) -> Value | None:
        """The value that begins at ``at``, or None."""
        return self._value(self._token(at), depth)

    def _value(self, token: re.Match[str] | None, depth: int) -> Value | None:
        """The value that begins with ``token``, or None."""
        if token is None:
            return None
        kind = token.lastindex
        assert kind is not None
        begin, text = token.start(kind), token[kind]
        if kind == _STRING:
            return Value(begin, token.end(), scalar=_unquoted(text))
        if kind == _NUMBER:
            return Value(begin, token.end(), scalar=float(text))
        if kind == _WORD:
            return Value(begin, token.end(), scalar=_WORDS[text]) if text in _WORDS else None
        if text not in _CLOSER or depth >= MAX_DEPTH:
            return None
        if text == "{":
            return self._object(begin, token.end(), depth)
        return self._array(begin, token.end(), depth, _CLOSER[text])

    def _array(self, begin: int, at: int, depth: int, closer: str) -> Value:
        array = Value(begin, at, items=[])
        while True:
            token = self._token(array.end)
            if token is not None and token[_MARK] == closer:
                array.end = token.end()
                return array
            item = self._value(token, depth + 1)
            if item is None or not self._append(array, item, closer):
                array.whole = False
                return array
            assert array.items is not None
            array.items.append(item)
            if not item.whole:
                array.whole = False
                return array

    def _object(self, begin: int, at: int, depth: int) -> Value:
        value = Value(begin, at, fields={})
        assert value.fields is not None
        while True:
            token = self._token(value.end)
            if token is not None and token[_MARK] == "}":
                value.end = token.end()
                return value
            key = _key(token)
            colon = self._token(token.end()) if token is not None and key is not None else None
            if key is None or colon is None or colon[_MARK] != ":":
                value.whole = False
                return value
            item = self.read(colon.end(), depth + 1)
            if item is None or not self._append(value, item, "}"):
                value.whole = False
                return value
            value.fields.setdefault(key, item)
            if not item.whole:
                value.whole = False
                return value

    def _append(self, outer: Value, item: Value, closer: str) -> bool:
        """Go past ``item`` and the comma behind it. False where a number may have been cut off in the middle."""
        outer.end = item.end
        token = self._token(item.end)
        if token is None:
            return item.items is not None or item.fields is not None or isinstance(item.scalar, str)
        mark = token[_MARK]
        if mark == ",":
            outer.end = token.end()
        return mark is not None or item.items is not None or item.fields is not None


def _key(token: re.Match[str] | None) -> str | None:
    if token is None:
        return None
    return _unquoted(token[_STRING]) if token[_STRING] else token[_WORD]


def _unquoted(text: str) -> str:
    inner = text[1:-1]
    if "\\" not in inner:
        return inner
    try:
        read = json.loads(f'"{inner}"' if text[0] == '"' else '"' + inner.replace("\\'", "'").replace('"', '\\"') + '"')
    except ValueError:
        return inner
    return read.encode("utf-8", "replace").decode("utf-8")  # half of a surrogate pair cannot be sent on
