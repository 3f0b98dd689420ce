"""The output processor of a text request: sampled tokens to events, and when the request ends."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

from .engine.sampling import Constraint, LogitBias, Logprobs, Sampling
from .events import Done, Event, FinishReason, MediaUse, TokenLogprob, Usage
from .text.grammar import Matcher
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
        image_sizes: tuple[tuple[int, int], ...] = (),
        logit_bias: LogitBias | None = None,
        matcher: Matcher | None = None,
        asked_image: int | None = 0,
    ):
        self._tokenizer, self._stop_ids = tokenizer, tokenizer.stop_ids
        self.sampling = sampling
        self._bias, self._matcher = logit_bias, matcher
        self._sampled: Logprobs | None = None  # those of the token that is taken next
        self._thinking, self._text, self._max_new_tokens, self._usage = thinking, text, max_new_tokens, usage
        self._began, self._first_at = began, None
        self._count = 0
        self._deliver = deliver
        self._media, self._image_sizes, self._asked_image = media, image_sizes, asked_image
        if thinking.forces:
            text.drop_unfinished()

    @property
    def text_only(self) -> bool:
        """Whether only tokens with text may follow: after thinking an answer is never empty, if no grammar says so."""
        return self._matcher is None and self._thinking.closed_by != "none" and not self._text.answer.strip()

    @property
    def logit_bias(self) -> LogitBias | None:
        """It holds for the answer; the thinking is free of it, and so are the markers around it."""
        return self._bias if self._answers else None

    @property
    def constraint(self) -> Constraint | None:
        return self._matcher if self._answers else None

    @property
    def _answers(self) -> bool:
        """Whether the next token is one of the answer, if it is sampled."""
        section = self._text.splitter.section
        return section == "answer" or (section is None and not self._thinking.thinks)

    def started(self, num_cached_tokens: int) -> None:
        self._usage = dataclasses.replace(self._usage, cached_tokens=num_cached_tokens)

    def forced(self) -> int | None:
        return self._thinking.forced()

    def sampled(self, logprobs: Logprobs) -> None:
        self._sampled = logprobs

    def take(self, token: int) -> int | None:
        logprobs, self._sampled = self._sampled, None
        if self._text.splitter.section == "reasoning":
            if token in self._stop_ids:
                token = self._thinking.close()  # a turn does not end inside the thinking: an answer follows
                self._text.drop_unfinished()
                logprobs = None
            elif self._matcher is not None and (marker := self._text.end_of_thinking(token)):
                # a structured answer begins with a token of its own
                token, *others = self._tokenizer.encode_bytes(marker)
                self._thinking.force(others)
        elif self._matcher is not None and self._answers and token not in self._stop_ids:
            self._matcher.consume(token)
        self._count += 1
        self._first_at = self._first_at or time.monotonic()
        if token in self._stop_ids:
            return self._finish("stop")
        for event in self._text.push(token, logprobs and self._token_logprob(token, logprobs)):
            self._deliver(event)
        if self._thinking.update(token, self._text.splitter.section):
            self._text.drop_unfinished()
        if self._text.stopped:
            return self._finish("stop_sequence")
        if self._matcher is not None and self._answers and self._matcher.complete:
            return self._finish("stop")
        return token if self._count < self._max_new_tokens else self._finish("length")

    def _token_logprob(self, token: int, logprobs: Logprobs) -> TokenLogprob:
        token_bytes = self._tokenizer.token_bytes
        top = tuple(TokenLogprob(other, token_bytes(other), logprob) for other, logprob in logprobs.top)
        return TokenLogprob(token, token_bytes(token), logprobs.logprob, top)

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
                image_sizes=self._image_sizes,
                asked_image=self._asked_image,
                logprobs=tuple(text.answer_logprobs),
            )
        )
