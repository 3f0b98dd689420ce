"""What a request gives back while it runs: pieces of thinking and answer, then one summary. Values only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "stop_sequence"]
ClosedBy = Literal["model", "budget", "none"]


@dataclass(frozen=True)
class Reasoning:
    """A piece of the thinking, without its markers."""

    text: str


@dataclass(frozen=True)
class TokenLogprob:
    """A token with the natural logarithm of its probability, as the model gives it: before temperature, top-k, top-p,
    a bias or a grammar. ``token_bytes`` may be a part of a character.

    ``top`` are the likeliest tokens at its place, falling, as many as were asked for; these have none themselves.
    """

    token_id: int
    token_bytes: bytes
    logprob: float
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Answer:
    """A piece of the answer, and where they were asked for the log-probabilities of the tokens that end in it.

    Of a token that is cut by the end of the thinking, or by a stop sequence, ``token_bytes`` are those that the answer
    has. A last piece may have log-probabilities and no text.
    """

    text: str
    logprobs: tuple[TokenLogprob, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Usage:
    """Token counts. Image tokens are part of the input, thinking (with its markers) of the output.

    ``cached_tokens`` of the input were not computed: prefix caching found their keys in the KV cache.
    """

    input_tokens: int
    image_tokens: int
    output_tokens: int
    reasoning_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True)
class MediaUse:
    """What was taken of a video, a document or an image, and what it cost.

    ``taken`` are the times of the frames in seconds, or the numbers of the pages; ``wanted`` of them were asked for, so
    that a larger number says that some did not fit or could not be decoded. ``width`` and ``height`` are of a frame, of
    the largest page, or of the image, in pixels; ``tokens`` are part of the input, labels included.
    """

    kind: Literal["video", "document", "image"]
    tokens: int
    width: int
    height: int
    taken: tuple[float, ...] = ()
    wanted: int = 1


@dataclass(frozen=True)
class Estimate:
    """What a request would cost: ``input_tokens`` in all, of which ``text_tokens`` are neither images nor labels.

    ``media`` has each image, video and document in order, ``context`` is what prompt and new tokens share, ``ids`` are
    the tokens of the prompt, each image as its placeholders.
    """

    input_tokens: int
    text_tokens: int
    context: int
    media: tuple[MediaUse, ...]
    ids: tuple[int, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Done:
    """The end of a request: the pieces joined, why it ended, and its figures (times in seconds).

    ``media`` has what was taken of each video and document, ``image_sizes`` the width and height of each image in
    pixels, as it was sent but upright, both in order. ``asked_image`` is the number, from 0, of the first image of the
    last message that has a file: the one that an answer is about if it names none. It is None where that message has
    videos or documents alone.
    """

    reasoning: str
    answer: str
    finish_reason: FinishReason
    thinking_closed_by: ClosedBy
    usage: Usage
    seed: int
    time_to_first_token: float
    tokens_per_second: float
    media: tuple[MediaUse, ...] = field(default=(), repr=False)
    image_sizes: tuple[tuple[int, int], ...] = field(default=(), repr=False)
    asked_image: int | None = 0
    logprobs: tuple[TokenLogprob, ...] = field(default=(), repr=False)  # of all of the answer


Event = Reasoning | Answer | Done
