"""Progress lines in the log: how many bytes, how fast, and how long still.

Knows neither where the bytes come from nor what they are.
"""

from __future__ import annotations

import logging
import threading
import time

log = logging.getLogger(__name__)

INTERVAL_SECONDS = 5.0


def amount(size: float) -> str:
    """``size`` bytes in words, decimal: ``33.1 GB``, ``7.1 MB``."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


class Progress:
    """A line every few seconds while a stage runs, and one with its whole time at its end.

    ``total`` None is a stage of unknown size. May be called from several threads.
    """

    def __init__(self, stage: str, total: int | None):
        self.stage = stage
        self.total = total
        self.done = 0
        self._lock = threading.Lock()
        self._began = self._reported = time.monotonic()
        self._reported_done = 0

    def add(self, count: int) -> None:
        with self._lock:
            self._reach(self.done + count)

    def reach(self, done: int) -> None:
        with self._lock:
            self._reach(done)

    def finish(self, past_tense: str) -> None:
        seconds = time.monotonic() - self._began
        rate = self.done / 1e9 / max(seconds, 1e-9)
        log.info("%s %s in %.1f s (%.2f GB/s)", past_tense, amount(self.done), seconds, rate)

    def _reach(self, done: int) -> None:
        self.done = done
        now = time.monotonic()
        if now - self._reported >= INTERVAL_SECONDS:
            log.info("%s: %s", self.stage, self._line(now))
            self._reported, self._reported_done = now, done

    def _line(self, now: float) -> str:
        rate = (self.done - self._reported_done) / (now - self._reported)
        speed = f"{rate / 1e6:.0f} MB/s" if rate >= 1e7 else f"{rate / 1e6:.1f} MB/s"
        if self.total is None:
            return f"{amount(self.done)}, {speed}"
        unit, name = (1e9, "GB") if self.total >= 1e9 else (1e6, "MB")
        of_total = f"{self.done / unit:.1f} of {self.total / unit:.1f} {name}"
        # of the average rate: with that of the last seconds the estimate would jump about
        average = self.done / (now - self._began)
        if not average:
            return f"{of_total}, {speed}"
        left = max(self.total - self.done, 0) / average
        return f"{of_total}, {speed}, {f'{left:.0f} s' if left < 120 else f'{left / 60:.0f} min'} left"
