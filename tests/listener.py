"""An output processor that keeps what an engine gives it, for tests of engines."""

from __future__ import annotations

from collections.abc import Callable

from kimi_vl.engine.requests import CountingOutputProcessor
from kimi_vl.engine.sampling import Sampling

GREEDY = Sampling(0, 1, 0, 0)


class Listener(CountingOutputProcessor):
    """Takes ``max_new_tokens`` tokens and keeps them."""

    def __init__(self, max_new_tokens: int, sampling: Sampling | None = None):
        super().__init__(max_new_tokens, sampling or GREEDY)
        self.tokens: list[int] = []
        self.after: Callable[[int], object] = lambda count: None  # called in the engine's thread, after each token

    def take(self, token: int) -> int | None:
        self.tokens.append(token)
        self.after(len(self.tokens))
        return super().take(token)

    def result(self) -> list[int]:
        """Waits for the end of the request."""
        assert self.over.wait(300), "the request did not end"
        if self.error:
            raise self.error
        return self.tokens
