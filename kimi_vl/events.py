"""What a request gives back while it runs: pieces of thinking and answer, then one summary. Values only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length", "stop_sequence"]
ClosedBy = Literal["model", "budget", "none"]


@dataclass(frozen=True)
class Reasoning:
    """A piece of the thinking, without its markers."""

    text: str


@dataclass(frozen=True)
class Answer:
    """A piece of the answer."""

    text: str


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
class Done:
    """The end of a request: the pieces joined, why it ended, and its figures (times in seconds)."""

    reasoning: str
    answer: str
    finish_reason: FinishReason
    thinking_closed_by: ClosedBy
    usage: Usage
    seed: int
    time_to_first_token: float
    tokens_per_second: float


Event = Reasoning | Answer | Done
