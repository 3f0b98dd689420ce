"""The two ways to refuse: a caller's mistake, and a checkpoint that cannot be used."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake of the caller, found before any computation.

    ``str(error)`` is ``"E_CODE: one sentence that says what to do"``; both parts may be shown to the caller.
    ``parameter`` is the name of the parameter at fault, where its own name is known to clients.
    """

    def __init__(self, code: str, message: str, parameter: str | None = None):
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
        self.parameter = parameter


class CheckpointError(ValueError):
    """A model folder that cannot be used; the text names the file, field or tensor at fault."""
