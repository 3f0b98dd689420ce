"""The chat format: messages to ids with image slots, and text to thinking and answer.

Control tokens come from the structure of the messages alone; their text is only ever text. Knows no tensors.
Source of the format: the chat template of the published checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .errors import UserError
from .stops import overlap
from .tokenizer import Tokenizer

DEFAULT_SYSTEM_PROMPT = "You are a helpful assistant"
THINK_OPEN, THINK_CLOSE = "◁think▷", "◁/think▷"
MEDIA_PAD = "<|media_pad|>"

Message = Mapping[str, Any]


@dataclass(frozen=True)
class _Control:
    """A special token put there by the format."""

    name: str


@dataclass(frozen=True)
class _Text:
    text: str


_Part = _Control | _Text


def is_image(part: Any) -> bool:
    """Whether a content part is an image: its type says so, or it has an ``image`` or ``image_url`` key."""
    return isinstance(part, Mapping) and (part.get("type") == "image" or "image" in part or "image_url" in part)


def render(messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
    """The conversation as the published chat template prints it, one ``<|media_pad|>`` an image."""
    parts = _layout(messages, add_generation_prompt)
    return "".join(part.name if isinstance(part, _Control) else part.text for part in parts)


def encode(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    image_tokens: Sequence[int],
    add_generation_prompt: bool = True,
    limit: int | None = None,
    continue_last: bool = False,
) -> list[int]:
    """Ids of the conversation, with ``image_tokens[k]`` placeholders for the k-th image.

    ``continue_last`` leaves the last message open, in place of beginning a new one. Raises :class:`UserError`:
    E_MESSAGES_INVALID for malformed messages or when the number of images differs;
    E_PROMPT_TOO_LONG beyond ``limit`` ids, found out without reading all of a long text.
    """
    counts = iter(image_tokens)
    ids: list[int] = []
    slots = 0
    parts = _layout(messages, add_generation_prompt and not continue_last)
    for part in parts[:-1] if continue_last else parts:
        if isinstance(part, _Text):
            ids += tokenizer.encode(part.text, limit=None if limit is None else limit - len(ids))
        elif part.name == MEDIA_PAD:
            slots += 1
            ids += [tokenizer.media_pad_id] * next(counts, 0)
        else:
            ids.append(tokenizer.special[part.name])
        if limit is not None and len(ids) > limit:
            raise UserError(
                "E_PROMPT_TOO_LONG",
                f"the conversation takes more than the {limit} tokens that fit; shorten it or send fewer images.",
            )
    if slots != len(image_tokens):
        raise UserError(
            "E_MESSAGES_INVALID",
            f"the messages have {slots} image parts and {len(image_tokens)} images came with them; make these equal.",
        )
    return ids


def begun(messages: Sequence[Message]) -> str | None:
    """The text of a last message of the assistant's own, which is then continued; None where there is none."""
    last = messages[-1]
    if not isinstance(last, Mapping) or last.get("role") != "assistant":
        return None
    parts = _content(_field(last, "content"))
    return "".join(part.text for part in parts if isinstance(part, _Text))


def without_earlier_thinking(messages: Sequence[Message]) -> list[Message]:
    """``messages`` with the thinking taken out of what the assistant said: a model is given earlier answers alone."""

    def answer(content: Any) -> Any:
        if isinstance(content, str):
            return content.rpartition(THINK_CLOSE)[2]
        if isinstance(content, Sequence):
            return [
                {**part, "text": answer(part["text"])}
                if isinstance(part, Mapping) and isinstance(part.get("text"), str)
                else part
                for part in content
            ]
        return content

    return [
        {**message, "content": answer(message.get("content"))}
        if isinstance(message, Mapping) and message.get("role") == "assistant"
        else message
        for message in messages
    ]


def _layout(messages: Sequence[Message], add_generation_prompt: bool) -> list[_Part]:
    parts: list[_Part] = []
    if not messages or _field(messages[0], "role") != "system":
        parts += _message("system", [_Text(DEFAULT_SYSTEM_PROMPT)])
    for message in messages:
        parts += _message(_field(message, "role"), list(_content(_field(message, "content"))))
    if add_generation_prompt:
        parts += [_Control("<|im_assistant|>"), _Text("assistant"), _Control("<|im_middle|>")]
    return _joined(parts)


def _message(role: str, content: list[_Part]) -> list[_Part]:
    opener: list[_Part] = [_Control(f"<|im_{role}|>")] if role in ("system", "user", "assistant") else []
    return [*opener, _Text(role), _Control("<|im_middle|>"), *content, _Control("<|im_end|>")]


def _content(content: Any) -> Iterator[_Part]:
    if isinstance(content, str):
        yield _Text(content)
        return
    if not isinstance(content, Sequence):
        raise UserError("E_MESSAGES_INVALID", "the content of a message must be a text or a list of parts.")
    for part in content:
        if is_image(part):
            yield _Control("<|media_start|>")
            yield _Text("image")
            yield _Control("<|media_content|>")
            yield _Control(MEDIA_PAD)
            yield _Control("<|media_end|>")
        elif isinstance(part, Mapping) and isinstance(part.get("text"), str):
            yield _Text(part["text"])
        else:
            raise UserError("E_MESSAGES_INVALID", "a content part must be an image or have a text.")


def _field(message: Any, name: str) -> Any:
    if not isinstance(message, Mapping) or name not in message:
        raise UserError("E_MESSAGES_INVALID", f"a message must be an object with a {name}.")
    if name == "role" and not isinstance(message[name], str):
        raise UserError("E_MESSAGES_INVALID", "the role of a message must be a text.")
    return message[name]


def _joined(parts: list[_Part]) -> list[_Part]:
    """Neighbouring texts become one, so that they are encoded as the template's single string would be."""
    joined: list[_Part] = []
    for part in parts:
        if isinstance(part, _Text) and joined and isinstance(joined[-1], _Text):
            joined[-1] = _Text(joined[-1].text + part.text)
        elif part != _Text(""):
            joined.append(part)
    return joined


Section = Literal["reasoning", "answer"]


class ThinkingSplitter:
    """Splits a growing text into thinking and answer, the same way however it is cut into pieces.

    A text that begins with the opening marker (white space before it is skipped) is thinking up to the closing
    marker, and answer after it. A text without the opening marker is all answer.
    """

    def __init__(self) -> None:
        self.section: Section | None = None  # None until the beginning is known
        self._space: list[str] = []  # what the text begins with, while that is white space
        self._held = ""

    def push(self, text: str) -> list[tuple[Section, str]]:
        """The pieces that ``text`` makes certain, in order; none of them empty."""
        if self.section is None and not self._held:
            rest = text.lstrip()
            self._space.append(text[: len(text) - len(rest)])
            text = rest
        self._held += text
        if self.section is None and self._held:
            if self._held.startswith(THINK_OPEN):
                self.section, self._held = "reasoning", self._held[len(THINK_OPEN) :]
            elif not THINK_OPEN.startswith(self._held):
                self.section, self._held = "answer", "".join(self._space) + self._held
        pieces: list[tuple[Section, str]] = []
        if self.section == "reasoning":
            thinking, closed, rest = self._held.partition(THINK_CLOSE)
            if closed:
                pieces.append(("reasoning", thinking))
                self.section, self._held = "answer", rest
            else:
                cut = len(self._held) - overlap(self._held, THINK_CLOSE)
                pieces.append(("reasoning", self._held[:cut]))
                self._held = self._held[cut:]
        if self.section == "answer":
            pieces.append(("answer", self._held))
            self._held = ""
        return [piece for piece in pieces if piece[1]]

    def finish(self) -> list[tuple[Section, str]]:
        """What is still held back, once no more text comes."""
        held = self._held if self.section else "".join(self._space) + self._held
        self._held, self._space = "", []
        return [(self.section or "answer", held)] if held else []
