"""Messages as clients send them, in one form: roles, and texts, images, videos and documents in the order in which they
come.

Reads what the chat APIs in use write where its meaning is clear, and refuses the rest by name: nothing that a message
says is dropped. A key that is null is absent, wherever it is. Knows neither tokens nor pixels.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import UserError

Message = Mapping[str, Any]
Role = Literal["system", "user", "assistant"]

_ROLES: dict[str, Role] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_TOOL_ROLES = frozenset({"tool", "function"})
_TOOL_KEYS = ("tool_calls", "function_call")
_BESIDE_CONTENT = ("image", "images", "image_url", "video", "video_url", "attachments", "experimental_attachments")
_REASONING_KEYS = ("reasoning_content", "reasoning")

_TEXT_TYPES = frozenset({"text", "input_text", "output_text"})
_THINKING_TYPES = frozenset({"thinking", "redacted_thinking", "reasoning"})

_URL_KEYS = frozenset({"source", "url", "path"})
_BASE64_KEYS = frozenset({"data", "base64", "bytes"})
_ELSEWHERE_KEYS = frozenset({"file_id", "file_uri", "fileUri", "file_path", "uri", "s3Location"})
_DEEPEST = 3
"""Objects inside a part that may lead to its file, one inside the other."""

_BARE_KEYS = frozenset(
    {"type", "text", "id", "index", "detail", "cache_control", "width", "height"}
    | {"min_pixels", "max_pixels", "resized_width", "resized_height"}
)
"""What a part without a file of its own may have: with any other key it may be a file that is not understood."""

_VIDEO_OPTIONS = {
    "fps": "fps",
    "max_frames": "max_frames",
    "num_frames": "max_frames",
    "nframes": "max_frames",
    "start": "start",
    "video_start": "start",
    "end": "end",
    "video_end": "end",
}
_DOCUMENT_OPTIONS = {"pages": "pages"}
"""What a part may say of how its file is read, and what that is called here."""


@dataclass(frozen=True)
class ImagePart:
    """An image in a message.

    ``source`` is a text (a URL or a path, which only the caller of this module may judge), or the value that a
    Python program put there (bytes, a path, a Pillow image); None takes the next of the images beside the messages.
    """

    source: Any = None


@dataclass(frozen=True)
class VideoPart:
    """A video in a message, with a source as an :class:`ImagePart` has it.

    ``options`` are those of ``fps``, ``max_frames``, ``start`` and ``end`` that the part has, unchecked.
    """

    source: Any = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DocumentPart:
    """A document in a message, with a source as an :class:`ImagePart` has it; ``options`` may have ``pages``."""

    source: Any = None
    options: Mapping[str, Any] = field(default_factory=dict)


FilePart = ImagePart | VideoPart | DocumentPart
Part = str | FilePart


@dataclass(frozen=True)
class Turn:
    """A message: who speaks, and the texts and files in order."""

    role: Role
    parts: tuple[Part, ...]

    @property
    def text(self) -> str:
        """All texts, joined."""
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def images(self) -> list[ImagePart]:
        return [part for part in self.parts if isinstance(part, ImagePart)]

    @property
    def files(self) -> list[FilePart]:
        """Images, videos and documents."""
        return [part for part in self.parts if not isinstance(part, str)]

    @property
    def says_something(self) -> bool:
        """Whether there is a file, or a text that is not white space."""
        return bool(self.files or self.text.strip())


def read(messages: Sequence[Message | Turn], bare: bool = True) -> list[Turn]:
    """The messages in one form; what was read before is kept as it is. Without ``bare`` each part has its file.

    Raises :class:`UserError`: E_MESSAGES_INVALID for what is malformed or not understood, E_PARAMETER for two options
    of a part that contradict each other, E_IMAGE_SOURCE, E_VIDEO_SOURCE and E_DOCUMENT_SOURCE for files that only
    another service could look up.
    """
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence):
        raise UserError("E_MESSAGES_INVALID", "messages must be a list of objects with a role and a content.")
    return [message if isinstance(message, Turn) else _turn(message, bare) for message in messages]


def asks_something(turns: Sequence[Turn]) -> bool:
    """Whether there is something to answer or to continue: whoever spoke last, the system messages at the beginning
    aside, is the user, or the assistant in a turn that is still open."""
    conversation = list(itertools.dropwhile(lambda turn: turn.role == "system", turns))
    for turn in reversed(conversation):
        if turn.says_something:
            return turn.role != "assistant" or turn is conversation[-1]
    return False


def asked_image(turns: Sequence[Turn]) -> int | None:
    """The number, from 0, of the first image of the last message that has a file; None where it has videos and
    documents alone, or no message has any."""
    last = max((index for index, turn in enumerate(turns) if turn.files), default=None)
    if last is None or not turns[last].images:
        return None
    return sum(len(turn.images) for turn in turns[:last])


def _turn(message: Any, bare: bool) -> Turn:
    if not isinstance(message, Mapping):
        raise UserError("E_MESSAGES_INVALID", "each message must be an object with a role and a content.")
    given = _given(message)
    role = _role(given.get("role"))
    for key in _TOOL_KEYS:
        if given.get(key):
            raise UserError("E_MESSAGES_INVALID", f"the model calls no tools; leave {key} out of the messages.")
    for key in _BESIDE_CONTENT:
        if given.get(key):
            raise UserError(
                "E_MESSAGES_INVALID", f"{key} of a message is not read; put each file into a part of its content."
            )
    content = given.get("content")
    if content is None and role == "assistant":
        content = given.get("refusal", "" if any(key in given for key in _REASONING_KEYS) else None)
    if isinstance(content, str):
        return Turn(role, (content,))
    if isinstance(content, bytes | bytearray) or not isinstance(content, Sequence):
        raise UserError("E_MESSAGES_INVALID", "the content of a message must be a text or a list of parts.")
    parts = (_part(part, role, bare) for part in content)
    return Turn(role, tuple(part for part in parts if part is not None))


def _role(role: Any) -> Role:
    if isinstance(role, str) and role in _TOOL_ROLES:
        raise UserError("E_MESSAGES_INVALID", f"the model knows no tools; leave messages of the role {role} out.")
    if not isinstance(role, str) or role not in _ROLES:
        raise UserError(
            "E_MESSAGES_INVALID", "the role of a message must be system, developer, user or assistant; write it so."
        )
    return _ROLES[role]


@dataclass(frozen=True)
class _Form:
    """How parts that hold files of one kind are written.

    A part of one of the ``types``, or with one of the ``keys``, whatever its type says, is such a file; one of the
    ``bare`` types may leave the file to those beside the messages.
    """

    noun: str
    part: Callable[[Any, Mapping[str, Any]], FilePart]
    types: frozenset[str]
    keys: tuple[str, ...]
    bare: frozenset[str]
    urls: frozenset[str]
    base64: frozenset[str]
    elsewhere: frozenset[str]
    options: Mapping[str, str]
    source_code: str
    example: str


_FORMS = (
    _Form(
        "an image",
        lambda source, options: ImagePart(source),
        frozenset({"image", "image_url", "input_image"}),
        ("image", "image_url", "input_image", "inline_data", "inlineData"),
        frozenset({"image"}),
        _URL_KEYS | {"image", "image_url", "input_image", "inline_data", "inlineData"},
        _BASE64_KEYS,
        _ELSEWHERE_KEYS | {"file", "file_url", "file_data", "fileData"},
        {},
        "E_IMAGE_SOURCE",
        '{"type": "image_url", "image_url": {"url": …}}',
    ),
    _Form(
        "a video",
        VideoPart,
        frozenset({"video", "video_url", "input_video"}),
        ("video", "video_url", "input_video"),
        frozenset({"video"}),
        _URL_KEYS | {"video", "video_url", "input_video"},
        _BASE64_KEYS,
        _ELSEWHERE_KEYS | {"file", "file_url", "file_data", "fileData"},
        _VIDEO_OPTIONS,
        "E_VIDEO_SOURCE",
        '{"type": "video_url", "video_url": {"url": …}}',
    ),
    _Form(
        "a document",
        DocumentPart,
        frozenset({"file", "input_file", "document"}),
        (),
        frozenset({"file", "document"}),
        _URL_KEYS | {"file", "input_file", "document", "file_url"},
        _BASE64_KEYS | {"file_data"},
        _ELSEWHERE_KEYS,
        _DOCUMENT_OPTIONS,
        "E_DOCUMENT_SOURCE",
        '{"type": "file", "file": {"filename": …, "file_data": …}}',
    ),
)
_TYPES = _TEXT_TYPES | _THINKING_TYPES | {"refusal"} | {name for form in _FORMS for name in form.types}


def _part(part: Any, role: Role, bare: bool) -> Part | None:
    """A part of a message; None for thinking of the assistant's own, which is not given to the model again."""
    if not isinstance(part, Mapping):
        raise UserError("E_MESSAGES_INVALID", "each part of a content must be an object with a type.")
    given = _given(part)
    kind = given.get("type")
    if kind is not None and not (isinstance(kind, str) and kind in _TYPES):
        raise UserError(
            "E_MESSAGES_INVALID", "the type of a content part must be text, image_url, video_url or file; change it."
        )
    if kind in _THINKING_TYPES and role == "assistant":
        return None
    text = given.get("refusal" if kind == "refusal" else "text")
    for form in _FORMS:
        if kind in form.types or any(key in given for key in form.keys):
            if text is not None and text != "":
                raise UserError("E_MESSAGES_INVALID", "a content part is a text or a file; make two parts of it.")
            return _file(given, form, bare)
    if not isinstance(text, str) or kind in _THINKING_TYPES:
        raise UserError("E_MESSAGES_INVALID", "a content part must have a text or be an image, a video or a document.")
    return text


def _file(part: dict[str, Any], form: _Form, bare: bool) -> FilePart:
    """The file of a part, which may stand there itself or in objects like ``{"source": {"data": …}}``."""
    inner = part
    options: dict[str, Any] = {}
    for _ in range(_DEEPEST + 1):
        options = _options(inner, form) | options
        keys = [key for key in inner if key in form.urls or key in form.base64 or key in form.elsewhere]
        may_be_bare = bare and inner is part and part.get("type") in form.bare
        if may_be_bare and not keys and part.keys() <= _BARE_KEYS | {*form.options}:
            return form.part(None, options)
        if len(keys) != 1 or (inner is not part and inner.get("type") == "text"):
            break
        key, value = keys[0], inner[keys[0]]
        if key in form.elsewhere:
            raise UserError(
                form.source_code, f"{form.noun} named by {key} is not looked up; send its data, as a data URL."
            )
        if isinstance(value, Mapping):
            inner = _given(value)
        elif isinstance(value, bool | int | float | list | tuple):
            break
        elif isinstance(value, str) and key in form.base64 and value[:5].lower() != "data:":
            return form.part("data:;base64," + value, options)
        else:
            return form.part(value, options)
    raise UserError("E_MESSAGES_INVALID", f"write {form.noun} as {form.example}.")


def _options(values: Mapping[str, Any], form: _Form) -> dict[str, Any]:
    """What an object of a part says of how its file is read."""
    keys: dict[str, str] = {}
    for key, name in form.options.items():
        if key in values and values[keys.setdefault(name, key)] != values[key]:
            raise UserError("E_PARAMETER", f"{keys[name]} and {key} of {form.noun} differ; give one of them.")
    return {name: values[key] for name, key in keys.items()}


def _given(values: Mapping[Any, Any]) -> dict[Any, Any]:
    """The keys that hold something: neither null nor, as columns of tables are filled up, an object of nulls."""
    return {key: value for key, value in values.items() if not _absent(value)}


def _absent(value: Any) -> bool:
    return value is None or (isinstance(value, Mapping) and all(inner is None for inner in value.values()))
