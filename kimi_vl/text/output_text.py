"""Tokens to events: decodes, splits thinking from answer, and applies stop sequences."""

from __future__ import annotations

from ..events import Answer, Event, Reasoning
from .stop_sequences import StopSequences
from .thinking import Section, ThinkingSplitter
from .tokenizer import TextStream, Tokenizer


class OutputText:
    """Turns the output tokens of one request into events of complete characters.

    ``prefill`` is the assistant prefill that the output continues; it gives no events and has no stop sequences.
    """

    def __init__(self, tokenizer: Tokenizer, stops: StopSequences, prefill: str):
        self._stream = TextStream(tokenizer)
        self.splitter = ThinkingSplitter()
        self.splitter.prefill(prefill)
        self._stops = stops
        self.reasoning = ""
        self.answer = ""

    @property
    def stopped(self) -> bool:
        return self._stops.stopped

    def drop_unfinished(self) -> None:
        """Discard an incomplete character or marker: it is not continued."""
        self._stream.drop_unfinished()
        self.splitter.drop_unfinished()

    def push(self, token: int) -> list[Event]:
        return self._events(self.splitter.push(self._stream.push(token)))

    def finish(self) -> list[Event]:
        events = self._events(self.splitter.push(self._stream.finish()) + self.splitter.finish())
        rest = self._stops.finish()
        self.answer += rest
        return [*events, Answer(rest)] if rest else events

    def _events(self, pieces: list[tuple[Section, str]]) -> list[Event]:
        events: list[Event] = []
        for section, piece in pieces:
            if section == "reasoning":
                self.reasoning += piece
                events.append(Reasoning(piece))
            elif ready := self._stops.push(piece):
                self.answer += ready
                events.append(Answer(ready))
        return events
