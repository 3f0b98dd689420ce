"""The chat format: messages to ids with image slots.

Control tokens come from the structure of the messages alone; their text is only ever text. Knows no tensors.
Source of the format: the chat template of the published checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import UserError
from .messages import ImagePart, Message, Part, Role, Turn, read
from .thinking import answer_of
from .tokenizer import Tokenizer

DEFAULT_SYSTEM_PROMPT = "You are a helpful assistant"
MEDIA_PAD = "<|media_pad|>"
_COUNTED = 4
"""Conversations up to so many times the limit are counted, so that it can be said how much longer they are."""


@dataclass(frozen=True)
class _Control:
    """A special token that the format adds."""

    name: str


@dataclass(frozen=True)
class _Text:
    text: str


_Part = _Control | _Text

IMAGE_SLOT_TEXT = "image"
IMAGE_SLOT_CONTROLS = 3
"""Tokens that an image takes beside this text and its placeholders."""

_IMAGE_SLOT: tuple[_Part, ...] = (
    _Control("<|media_start|>"),
    _Text(IMAGE_SLOT_TEXT),
    _Control("<|media_content|>"),
    _Control(MEDIA_PAD),
    _Control("<|media_end|>"),
)


def render(messages: Sequence[Message | Turn], add_generation_prompt: bool = True) -> str:
    """The conversation as the published chat template prints it, one ``<|media_pad|>`` an image."""
    parts = _layout(messages, add_generation_prompt)
    return "".join(part.name if isinstance(part, _Control) else part.text for part in parts)


def encode(
    tokenizer: Tokenizer,
    messages: Sequence[Message | Turn],
    image_tokens: Sequence[int],
    add_generation_prompt: bool = True,
    limit: int | None = None,
    continue_final_message: bool = False,
) -> list[int]:
    """Ids of the conversation, with ``image_tokens[k]`` placeholders for the k-th image.

    ``continue_final_message`` leaves the last message open, in place of beginning a new one. Raises :class:`UserError`:
    E_MESSAGES_INVALID for malformed messages or when the number of images differs;
    E_PROMPT_TOO_LONG beyond ``limit`` ids, with their number, found out without reading all of a very long text.
    """
    counts = iter(image_tokens)
    ids: list[int] = []
    slots = 0
    parts = _layout(messages, add_generation_prompt and not continue_final_message)
    for part in parts[:-1] if continue_final_message else parts:
        if isinstance(part, _Text):
            ids += tokenizer.encode(part.text, limit=None if limit is None else _COUNTED * limit - len(ids))
        elif part.name == MEDIA_PAD:
            slots += 1
            ids += [tokenizer.media_pad_id] * next(counts, 0)
        else:
            ids.append(tokenizer.special[part.name])
        if limit is not None and len(ids) > _COUNTED * limit:
            raise too_long(f"more than {_COUNTED * limit}", limit)
    if slots != len(image_tokens):
        raise UserError(
            "E_MESSAGES_INVALID",
            f"the messages have {slots} image parts and {len(image_tokens)} images came with them; make these equal.",
        )
    if limit is not None and len(ids) > limit:
        raise too_long(len(ids), limit)
    return ids


def too_long(count: int | str, limit: int) -> UserError:
    """The refusal of a prompt of ``count`` tokens."""
    return UserError(
        "E_PROMPT_TOO_LONG", f"the prompt takes {count} tokens of {limit}; shorten it or send fewer images."
    )


def assistant_prefill(turns: Sequence[Turn]) -> str | None:
    """The text of a last turn of the assistant's own, which is then continued; None where there is none."""
    return turns[-1].text if turns and turns[-1].role == "assistant" else None


def without_earlier_thinking(turns: Sequence[Turn]) -> list[Turn]:
    """``turns`` without the thinking in the assistant's turns: the model is given earlier answers alone.

    Thinking begins with an opening marker, the model's own or a think tag, at the start (white space before it does
    not count), and goes on to the first closing one, or to the end where it was cut off. Anything else is an answer.
    """
    return [_answer(turn) if turn.role == "assistant" else turn for turn in turns]


def _answer(turn: Turn) -> Turn:
    """``turn`` without its thinking, which may go over several parts."""
    begin = len(turn.text) - len(answer_of(turn.text))
    parts: list[Part] = []
    for part in turn.parts:
        if isinstance(part, str):
            parts.append(part[begin:])
            begin = max(0, begin - len(part))
        else:
            parts.append(part)
    return Turn(turn.role, tuple(parts))


def _layout(messages: Sequence[Message | Turn], add_generation_prompt: bool) -> list[_Part]:
    parts: list[_Part] = []
    turns = read(messages)
    if not turns or turns[0].role != "system":
        parts += _turn(Turn("system", (DEFAULT_SYSTEM_PROMPT,)))
    for turn in turns:
        parts += _turn(turn)
    if add_generation_prompt:
        parts += _opening("assistant")
    return _joined(parts)


def _turn(turn: Turn) -> list[_Part]:
    content: list[_Part] = []
    for part in turn.parts:
        if not isinstance(part, str | ImagePart):
            raise UserError(
                "E_MESSAGES_INVALID", "the format knows no videos and documents; send frames and pages as images."
            )
        content += [_Text(part)] if isinstance(part, str) else _IMAGE_SLOT
    return [*_opening(turn.role), *content, _Control("<|im_end|>")]


def _opening(role: Role) -> list[_Part]:
    return [_Control(f"<|im_{role}|>"), _Text(role), _Control("<|im_middle|>")]


def _joined(parts: list[_Part]) -> list[_Part]:
    """Neighbouring texts become one, so that they are encoded as the template's single string would be."""
    joined: list[_Part] = []
    for part in parts:
        if isinstance(part, _Text) and joined and isinstance(joined[-1], _Text):
            joined[-1] = _Text(joined[-1].text + part.text)
        elif part != _Text(""):
            joined.append(part)
    return joined
