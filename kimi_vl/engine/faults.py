"""Whom an error in the engine's thread ends: one request, or the engine.

- Too little memory ends the request at fault, which is told to try again later (E_OVERLOADED).
- A device that is lost ends the engine: no step can succeed any more.
- Anything else is that request's own fault, until several requests in a row have failed alone and no token was sampled
  in between. Then the engine checks itself with a prompt that is known to be right, and what it cannot answer ends it.

What ends the engine turns its health false, and every caller is told at once.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, ParamSpec, TypeVar

import torch

from ..device import cuda
from ..errors import UserError

P = ParamSpec("P")
T = TypeVar("T")
IN_A_ROW = 3
_OUT_OF_MEMORY = ("DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")


class Overloaded(UserError):
    """More work than the ``cause`` allows: too many requests in the queue, too little memory, or a missed deadline.

    Trying again at once helps against none of them; after a missed deadline it costs as much again.
    """

    def __init__(self, message: str, cause: Literal["queue", "memory", "deadline"]):
        super().__init__("E_OVERLOADED", message)
        self.cause = cause


class NotFinite(RuntimeError):
    """A request's scores hold an infinity or a NaN."""

    def __init__(self) -> None:
        super().__init__("the model produced a value that is not finite")


class Broken(RuntimeError):
    """No request can be served any more."""


@dataclass(frozen=True)
class Failed:
    """An attempt without a result: the kind of its error, for logs, and what the request at fault is to be told."""

    kind: str
    reason: Exception


class Faults:
    """Judges errors of one engine's steps on ``device``."""

    def __init__(self, device: torch.device):
        self._device = device
        self._in_a_row = 0

    def attempt(self, action: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | Failed:
        """What ``action`` returns, or what came in between. Raises :class:`Broken`.

        When a failure is returned, nothing of the failed attempt is alive, so that another one has its memory.
        """
        try:
            return action(*args, **kwargs)
        except BaseException as error:  # an output processor may raise anything
            failed = Failed(type(error).__name__, self._judge(as_exception(error)))
        # not before the error is gone, whose traceback keeps every tensor of the failed attempt
        if isinstance(failed.reason, Overloaded):
            cuda.give_back_unused_memory(self._device)
        return failed

    def _judge(self, error: Exception) -> Exception:
        if isinstance(error, Broken):
            raise error
        if cuda.lost(self._device, error):
            raise Broken(f"the device is lost ({type(error).__name__}); start the program again") from error
        if out_of_memory(error):
            return Overloaded(
                "there was not enough memory for this request; try again later, or ask for less.", "memory"
            )
        clear_frames(error)
        return error

    def success(self) -> None:
        """A token was sampled."""
        self._in_a_row = 0

    def alone(self, failure: Exception) -> bool:
        """A request failed in a step of its own; whether the engine should check itself now."""
        if not isinstance(failure, UserError | NotFinite):
            self._in_a_row += 1
        if self._in_a_row < IN_A_ROW:
            return False
        self._in_a_row = 0
        return True


def as_exception(error: BaseException) -> Exception:
    """What can be raised again in another thread without ending it: not another thread's way to end."""
    return error if isinstance(error, Exception) else RuntimeError(f"stopped by {type(error).__name__}")


def out_of_memory(error: Exception) -> bool:
    """Whether memory was all that was missing. Libraries and the CPU's allocator say it in words alone."""
    if isinstance(error, torch.AcceleratorError):
        return getattr(error, "error_code", None) == cuda.OUT_OF_MEMORY
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)
    )


def clear_frames(error: BaseException) -> None:
    """Let go of the local variables in the tracebacks of an error and of those that led to it."""
    seen: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in seen:
        seen.append(following)
        traceback.clear_frames(following.__traceback__)
        following = following.__cause__ or following.__context__
