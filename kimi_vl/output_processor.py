"""The output processor of a text request: sampled tokens to events, and when the request ends."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

from .engine.sampling import Sampling
from .events import Done, Event, FinishReason, MediaUse, Usage
from .text.output_text import OutputText
from .text.thinking import ThinkingBudget
from .text.tokenizer import Tokenizer

Deliver = Callable[[Event | Exception], None]


class TextOutputProcessor:
    """Delivers the events of one request, and applies its budgets and stop rules.

    The engine calls it as an :class:`kimi_vl.engine.requests.OutputProcessor`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        sampling: Sampling,
        thinking: ThinkingBudget,
        text: OutputText,
        max_new_tokens: int,
        usage: Usage,
        began: float,
        deliver: Deliver,
        media: tuple[MediaUse, ...] = (),
    ):
        self._stop_ids = tokenizer.stop_ids
        self.sampling = sampling
        self._thinking, self._text, self._max_new_tokens, self._usage = thinking, text, max_new_tokens, usage
        self._began, self._first_at = began, None
        self._count = 0
        self._deliver = deliver
        self._media = media
        if thinking.closing:
            text.drop_unfinished()

    @property
    def text_only(self) -> bool:
        """Whether only tokens with text may follow: after thinking an answer is never empty."""
        return self._thinking.closed_by != "none" and not self._text.answer.strip()

    def started(self, num_cached_tokens: int) -> None:
        self._usage = dataclasses.replace(self._usage, cached_tokens=num_cached_tokens)

    def forced(self) -> int | None:
        return self._thinking.forced()

    def take(self, token: int) -> int | None:
        if token in self._stop_ids and self._text.splitter.section == "reasoning":
            token = self._thinking.close()  # a turn does not end inside the thinking: an answer follows
            self._text.drop_unfinished()
        self._count += 1
        self._first_at = self._first_at or time.monotonic()
        if token in self._stop_ids:
            return self._finish("stop")
        for event in self._text.push(token):
            self._deliver(event)
        if self._thinking.update(token, self._text.splitter.section):
            self._text.drop_unfinished()
        if self._text.stopped:
            return self._finish("stop_sequence")
        return token if self._count < self._max_new_tokens else self._finish("length")

    def fail(self, error: Exception) -> None:
        self._deliver(error)

    def _finish(self, reason: FinishReason) -> None:
        text, thinking = self._text, self._thinking
        if reason == "length":
            text.drop_unfinished()
        if not text.stopped:
            for event in text.finish():
                self._deliver(event)
        first_at = self._first_at or self._began
        elapsed = time.monotonic() - first_at
        self._deliver(
            Done(
                reasoning=text.reasoning,
                answer=text.answer,
                finish_reason=reason,
                thinking_closed_by=thinking.closed_by,
                usage=dataclasses.replace(
                    self._usage, output_tokens=self._count, reasoning_tokens=thinking.reasoning_tokens
                ),
                seed=self.sampling.seed,
                time_to_first_token=first_at - self._began,
                tokens_per_second=(self._count - 1) / elapsed if self._count > 1 and elapsed > 0 else 0.0,
                media=self._media,
            )
        )
