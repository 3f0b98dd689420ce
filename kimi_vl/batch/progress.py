"""How far a batch is, on stderr: a bar on a terminal, a line now and then elsewhere. Never anything of its content."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import TextIO

from .results import Earlier

BAR, BAR_SECONDS, LINE_SECONDS, RATE_SECONDS = 24, 0.2, 30.0, 120.0


class Progress:
    """Counts answers, beside those of ``earlier`` runs. ``total`` estimates the number of lines; None: nobody knows."""

    def __init__(
        self,
        stream: TextIO,
        total: Callable[[], float | None],
        earlier: Earlier,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._stream, self._total, self._clock = stream, total, clock
        self._terminal = stream.isatty()
        self._earlier, self._answered, self._failed = earlier, 0, 0
        self._shown_at = self._began = clock()
        self._recent: deque[tuple[float, int]] = deque([(self._began, 0)])
        self._width = 0

    def answered(self, failed: bool) -> None:
        self._answered += 1
        self._failed += failed
        now = self._clock()
        if now - self._shown_at >= (BAR_SECONDS if self._terminal else LINE_SECONDS):
            self._recent.append((now, self._answered))
            while len(self._recent) > 2 and now - self._recent[0][0] > RATE_SECONDS:
                self._recent.popleft()
            self._shown_at = now
            self._show(now)

    @property
    def failed(self) -> int:
        """Lines that could not be answered, in this run and before."""
        return self._earlier.failed + self._failed

    def end(self) -> None:
        """The last line, which stays."""
        self._clear()
        seconds = self._clock() - self._began
        failed = f", {self.failed:,} failed" if self.failed else ""
        earlier = f" ({self._earlier.answered:,} of them before)" if self._earlier.answered else ""
        self._stream.write(
            f"{self._earlier.answered + self._answered:,} answered{earlier}{failed}, in {duration(seconds)}\n"
        )
        self._stream.flush()

    def _show(self, now: float) -> None:
        done = self._earlier.answered + self._answered
        since, before = self._recent[0]
        rate = (self._answered - before) / (now - since) if now > since else 0.0
        total = self._total()
        parts = [f"{done:,} answered"]
        if total is not None:
            parts[0] = f"{done:,} of {round(max(total, done)):,} answered"
        if self.failed:
            parts.append(f"{self.failed:,} failed")
        parts.append(f"{rate * 60:,.1f} a minute")
        if total is not None and rate > 0:
            parts.append(f"{duration(max(0.0, total - done) / rate)} left")
        text = ", ".join(parts)
        if self._terminal:
            full = round(BAR * min(1.0, done / total)) if total else 0
            bar = f"[{'#' * full}{'.' * (BAR - full)}] " if total else ""
            self._clear()
            self._stream.write(bar + text)
            self._width = len(bar + text)
        else:
            self._stream.write(text + "\n")
        self._stream.flush()

    def _clear(self) -> None:
        if self._width:
            self._stream.write("\r\x1b[K")
            self._width = 0


def duration(seconds: float) -> str:
    """``seconds`` as a person says it."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes / 60:.1f} h"
