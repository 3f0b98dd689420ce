"""Messages as clients send them, in one form: roles, and texts and images in the order in which they come.

Reads what the chat APIs in use write where its meaning is clear, and refuses the rest by name: nothing that a message
says is dropped. A key that is null is absent, wherever it is. Knows neither tokens nor pixels.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import UserError

Message = Mapping[str, Any]
Role = Literal["system", "user", "assistant"]

_ROLES: dict[str, Role] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_TOOL_ROLES = frozenset({"tool", "function"})
_TOOL_KEYS = ("tool_calls", "function_call")
_IMAGES_BESIDE_CONTENT = ("image", "images", "image_url", "attachments", "experimental_attachments")
_REASONING_KEYS = ("reasoning_content", "reasoning")

_TEXT_TYPES = frozenset({"text", "input_text", "output_text"})
_IMAGE_TYPES = frozenset({"image", "image_url", "input_image"})
_THINKING_TYPES = frozenset({"thinking", "redacted_thinking", "reasoning"})
_TYPES = _TEXT_TYPES | _IMAGE_TYPES | _THINKING_TYPES | {"refusal"}

_IMAGE_KEYS = ("image", "image_url", "input_image", "inline_data", "inlineData")
"""A part with one of these is an image, whatever its type says."""

_URL_KEYS = frozenset({*_IMAGE_KEYS, "source", "url", "path"})
_BASE64_KEYS = frozenset({"data", "base64", "bytes"})
_ELSEWHERE_KEYS = frozenset(
    {"file", "file_id", "file_uri", "fileUri", "file_url", "file_path", "file_data", "fileData", "uri", "s3Location"}
)
_LOCATION_KEYS = _URL_KEYS | _BASE64_KEYS | _ELSEWHERE_KEYS
_DEEPEST = 3
"""Objects inside a part that may lead to its image, one inside the other."""

_BARE_KEYS = frozenset(
    {"type", "text", "id", "index", "detail", "cache_control", "width", "height"}
    | {"min_pixels", "max_pixels", "resized_width", "resized_height"}
)
"""What a part without an image of its own may have: with any other key it may be an image that is not understood."""


@dataclass(frozen=True)
class ImagePart:
    """An image in a message.

    ``source`` is a text (a URL or a path, which only the caller of this module may judge), or the value that a
    Python program put there (bytes, a path, a Pillow image); None takes the next of the images beside the messages.
    """

    source: Any = None


@dataclass(frozen=True)
class Turn:
    """A message: who speaks, and the texts and images in order."""

    role: Role
    parts: tuple[str | ImagePart, ...]

    @property
    def text(self) -> str:
        """All texts, joined."""
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def images(self) -> list[ImagePart]:
        return [part for part in self.parts if isinstance(part, ImagePart)]

    @property
    def says_something(self) -> bool:
        """Whether there is an image, or a text that is not white space."""
        return bool(self.images or self.text.strip())


def read(messages: Sequence[Message | Turn]) -> list[Turn]:
    """The messages in one form; what was read before is kept as it is.

    Raises :class:`UserError`: E_MESSAGES_INVALID for what is malformed or not understood, E_IMAGE_SOURCE for images
    that only another service could look up.
    """
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence):
        raise UserError("E_MESSAGES_INVALID", "messages must be a list of objects with a role and a content.")
    return [message if isinstance(message, Turn) else _turn(message) for message in messages]


def asks_something(turns: Sequence[Turn]) -> bool:
    """Whether there is something to answer or to continue: whoever spoke last, the system messages at the beginning
    aside, is the user, or the assistant in a turn that is still open."""
    conversation = list(itertools.dropwhile(lambda turn: turn.role == "system", turns))
    for turn in reversed(conversation):
        if turn.says_something:
            return turn.role != "assistant" or turn is conversation[-1]
    return False


def _turn(message: Any) -> Turn:
    if not isinstance(message, Mapping):
        raise UserError("E_MESSAGES_INVALID", "each message must be an object with a role and a content.")
    given = _given(message)
    role = _role(given.get("role"))
    for key in _TOOL_KEYS:
        if given.get(key):
            raise UserError("E_MESSAGES_INVALID", f"the model calls no tools; leave {key} out of the messages.")
    for key in _IMAGES_BESIDE_CONTENT:
        if given.get(key):
            raise UserError(
                "E_MESSAGES_INVALID", f"{key} of a message is not read; put each image into a part of its content."
            )
    content = given.get("content")
    if content is None and role == "assistant":
        content = given.get("refusal", "" if any(key in given for key in _REASONING_KEYS) else None)
    if isinstance(content, str):
        return Turn(role, (content,))
    if isinstance(content, bytes | bytearray) or not isinstance(content, Sequence):
        raise UserError("E_MESSAGES_INVALID", "the content of a message must be a text or a list of parts.")
    parts = (_part(part, role) for part in content)
    return Turn(role, tuple(part for part in parts if part is not None))


def _role(role: Any) -> Role:
    if isinstance(role, str) and role in _TOOL_ROLES:
        raise UserError("E_MESSAGES_INVALID", f"the model knows no tools; leave messages of the role {role} out.")
    if not isinstance(role, str) or role not in _ROLES:
        raise UserError(
            "E_MESSAGES_INVALID", "the role of a message must be system, developer, user or assistant; write it so."
        )
    return _ROLES[role]


def _part(part: Any, role: Role) -> str | ImagePart | None:
    """A part of a message; None for thinking of the assistant's own, which is not given to the model again."""
    if not isinstance(part, Mapping):
        raise UserError("E_MESSAGES_INVALID", "each part of a content must be an object with a type.")
    given = _given(part)
    kind = given.get("type")
    if kind is not None and not (isinstance(kind, str) and kind in _TYPES):
        raise UserError("E_MESSAGES_INVALID", "the type of a content part must be text, image or image_url.")
    if kind in _THINKING_TYPES and role == "assistant":
        return None
    text = given.get("refusal" if kind == "refusal" else "text")
    if kind in _IMAGE_TYPES or any(key in given for key in _IMAGE_KEYS):
        if text is not None and text != "":
            raise UserError("E_MESSAGES_INVALID", "a content part is a text or an image; make two parts of it.")
        return _image(given)
    if not isinstance(text, str) or kind in _THINKING_TYPES:
        raise UserError("E_MESSAGES_INVALID", "a content part must be an image or have a text.")
    return text


def _image(part: dict[str, Any]) -> ImagePart:
    """The image of a part, which may stand there itself or in objects like ``{"source": {"data": …}}``."""
    inner = part
    for _ in range(_DEEPEST + 1):
        keys = [key for key in inner if key in _LOCATION_KEYS]
        if not keys and inner is part and part.get("type") == "image" and part.keys() <= _BARE_KEYS:
            return ImagePart()
        if len(keys) != 1:
            break
        key, value = keys[0], inner[keys[0]]
        if key in _ELSEWHERE_KEYS:
            raise UserError(
                "E_IMAGE_SOURCE", f"an image named by {key} is not looked up; send its data, as a data URL."
            )
        if isinstance(value, Mapping):
            inner = _given(value)
        elif isinstance(value, bool | int | float | list | tuple):
            break
        elif isinstance(value, str) and key in _BASE64_KEYS and value[:5].lower() != "data:":
            return ImagePart("data:;base64," + value)
        else:
            return ImagePart(value)
    raise UserError("E_MESSAGES_INVALID", 'write an image part as {"type": "image_url", "image_url": {"url": …}}.')


def _given(values: Mapping[Any, Any]) -> dict[Any, Any]:
    """The keys that hold something: neither null nor, as columns of tables are filled up, an object of nulls."""
    return {key: value for key, value in values.items() if not _absent(value)}


def _absent(value: Any) -> bool:
    return value is None or (isinstance(value, Mapping) and all(inner is None for inner in value.values()))
