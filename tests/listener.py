"""An output processor that keeps what an engine gives it, for tests of engines."""

from __future__ import annotations

import threading
from collections.abc import Callable

from kimi_vl.engine.requests import NullOutputProcessor
from kimi_vl.engine.sampling import Sampling

GREEDY = Sampling(0, 1, 0, 0)


class Listener(NullOutputProcessor):
    """Takes ``max_new_tokens`` tokens and keeps them."""

    def __init__(self, max_new_tokens: int, sampling: Sampling | None = None):
        self.max_new_tokens, self.sampling = max_new_tokens, sampling or GREEDY
        self.tokens: list[int] = []
        self.error: Exception | None = None
        self.over = threading.Event()
        self.after: Callable[[int], object] = lambda count: None  # called in the engine's thread, after each token

    def take(self, token: int) -> int | None:
        self.tokens.append(token)
        self.after(len(self.tokens))
        if len(self.tokens) < self.max_new_tokens:
            return token
        self.over.set()
        return None

    def fail(self, error: Exception) -> None:
        self.error = error
        self.over.set()

    def result(self) -> list[int]:
        """Waits for the end of the request."""
        assert self.over.wait(300), "the request did not end"
        if self.error:
            raise self.error
        return self.tokens
