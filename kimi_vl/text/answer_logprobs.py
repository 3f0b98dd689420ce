"""Which sampled tokens make up an answer: their log-probabilities leave with the text that they are part of.

Tokens are cut by other rules than text: one may hold the end of the thinking and the beginning of the answer, or a part
of a character, or the beginning of a stop sequence.
"""

from __future__ import annotations

import codecs
import dataclasses
from collections import deque

from ..events import TokenLogprob


class AnswerLogprobs:
    """Matches tokens with the characters of one output, which are counted from its beginning.

    A token is part of the answer where one of its bytes is, and keeps only those of its bytes that are: the bytes of
    all its tokens joined are the answer's text in UTF-8, but where bytes that are not UTF-8 became U+FFFD.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._characters = 0
        # with the character that each byte of a token is part of
        self._waiting: deque[tuple[TokenLogprob, list[int]]] = deque()

    def push(self, token_bytes: bytes, logprob: TokenLogprob | None) -> None:
        """Add a token; one without a log-probability was not sampled, and is no part of an answer."""
        places = []
        for byte in token_bytes:
            self._characters += len(self._decoder.decode(bytes([byte])))
            unfinished = self._decoder.getstate()[0]
            places.append(self._characters if unfinished else self._characters - 1)
        if logprob is not None:
            self._waiting.append((logprob, places))

    def drop_waiting(self) -> None:
        """None of the tokens so far is part of the answer."""
        self._waiting.clear()

    def drop_unfinished(self) -> None:
        """The beginning of a character at the end is no text; see :meth:`TextStream.drop_unfinished`."""
        self._decoder.reset()

    def leave(self, begin: int, end: int, last: bool) -> tuple[TokenLogprob, ...]:
        """The tokens of which all has left, now that characters ``begin`` to ``end`` of the output are the answer.

        With ``last`` nothing more comes, and the others leave with what the answer has of them.
        """
        left = []
        while self._waiting and (last or self._waiting[0][1][-1] < end):
            logprob, places = self._waiting.popleft()
            kept = bytes(byte for byte, place in zip(logprob.token_bytes, places, strict=True) if begin <= place < end)
            if kept:
                left.append(dataclasses.replace(logprob, token_bytes=kept))
        return tuple(left)
