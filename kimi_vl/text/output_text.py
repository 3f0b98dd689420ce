"""Tokens to events: decodes, splits thinking from answer, and applies stop sequences."""

from __future__ import annotations

import dataclasses

from ..events import Answer, Event, Reasoning, TokenLogprob
from .answer_logprobs import AnswerLogprobs
from .stop_sequences import StopSequences
from .thinking import THINK_CLOSE, Section, ThinkingSplitter
from .tokenizer import TextStream, Tokenizer


class OutputText:
    """Turns the output tokens of one request into events of complete characters.

    ``prefill`` is the assistant prefill that the output continues; it gives no events and has no stop sequences. With
    ``logprobs``, the pieces of the answer have those of their tokens.
    """

    def __init__(self, tokenizer: Tokenizer, stops: StopSequences, prefill: str, logprobs: bool = False):
        self._tokenizer = tokenizer
        self._stream = TextStream(tokenizer)
        self.splitter = ThinkingSplitter()
        self.prefilled_answer = self.splitter.prefill(prefill)
        self._stops = stops
        self._logprobs = AnswerLogprobs() if logprobs else None
        self._characters = 0  # of the output
        self._answer_begin: int | None = None  # in characters of the output
        self.reasoning = ""
        self.answer = ""
        self.answer_logprobs: list[TokenLogprob] = []

    def skip_thinking(self) -> None:
        """All that follows is answer, whatever it looks like."""
        self.prefilled_answer += self.splitter.skip_thinking()

    def end_of_thinking(self, token: int) -> bytes | None:
        """The bytes of a token up to the end of the closing marker, where it ends the thinking and goes on after it."""
        before, own = self.splitter.held.encode() + self._stream.unfinished, self._tokenizer.token_bytes(token)
        _, marker, after = (before + own).partition(THINK_CLOSE.encode())
        return own[: len(own) - len(after)] if marker and after and self.splitter.section == "reasoning" else None

    @property
    def stopped(self) -> bool:
        return self._stops.stopped

    def drop_unfinished(self) -> None:
        """Discard an incomplete character or marker: it is not continued."""
        self._stream.drop_unfinished()
        if self._logprobs is not None:
            self._logprobs.drop_unfinished()
        self.splitter.drop_unfinished()

    def push(self, token: int, logprob: TokenLogprob | None = None) -> list[Event]:
        if self._logprobs is not None:
            if self.splitter.section == "reasoning":
                self._logprobs.drop_waiting()
            if not self._tokenizer.is_special(token):
                self._logprobs.push(self._tokenizer.token_bytes(token), logprob)
        text = self._stream.push(token)
        self._characters += len(text)
        return self._with_logprobs(self._events(self.splitter.push(text)), last=self.stopped)

    def finish(self) -> list[Event]:
        """What is still held back, once no more tokens come and no stop sequence was found."""
        text = self._stream.finish()
        self._characters += len(text)
        events = self._events(self.splitter.push(text) + self.splitter.finish())
        rest = self._stops.finish()
        self.answer += rest
        return self._with_logprobs([*events, Answer(rest)] if rest else events, last=True)

    def _with_logprobs(self, events: list[Event], last: bool) -> list[Event]:
        """``events``, and with the last piece of the answer the log-probabilities of the tokens that have left."""
        if self._logprobs is None or self._answer_begin is None:
            return events
        found = self._logprobs.leave(self._answer_begin, self._answer_begin + len(self.answer), last)
        if found:
            self.answer_logprobs += found
            piece = events.pop() if events and isinstance(events[-1], Answer) else Answer("")
            events.append(dataclasses.replace(piece, logprobs=found))
        return events

    def _events(self, pieces: list[tuple[Section, str]]) -> list[Event]:
        if self._answer_begin is None:
            answer = sum(len(piece) for section, piece in pieces if section == "answer")
            self._answer_begin = self._characters - answer if answer else None
        events: list[Event] = []
        for section, piece in pieces:
            if section == "reasoning":
                self.reasoning += piece
                events.append(Reasoning(piece))
            elif ready := self._stops.push(piece):
                self.answer += ready
                events.append(Answer(ready))
        return events
