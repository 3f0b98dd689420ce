"""The one check of a request's parameters: of which type each may be, and between which bounds.

Every caller's values pass here before anything is computed. A wrong one raises :class:`UserError` (E_PARAMETER) that
names the parameter. Knows numbers and texts; not what they are used for.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping
from typing import Any

from .errors import UserError

MAX_LENGTH_TOKENS = 131_072
MAX_TOP_K = 2**31 - 1
MAX_LOGPROBS = 20
MAX_BIAS, MAX_BIASED = 100, 1024  # of a logit, and tokens with one
MAX_TOKEN_ID = 2**31 - 1
MAX_SEED = 2**63 - 1  # what a signed integer of 64 bits holds: seeds are reported through JSON and Cog's metrics


def number(name: str, value: Any, low: float, high: float | None = None) -> float:
    """``value`` as a finite float from ``low`` to ``high``. NumPy's and torch's scalars pass, texts do not."""
    try:
        result = _float(value)
    except OverflowError:  # an integer that no float can hold
        result = math.inf
    except Exception:  # whatever a stranger's conversion raises
        raise UserError("E_PARAMETER", f"{name} must be a number; change it.") from None
    if not math.isfinite(result):
        raise UserError("E_PARAMETER", f"{name} must be a finite number; change it.")
    return _within(name, result, low, high)


def integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    """``value`` as an int from ``low`` to ``high``. A float without a fraction passes: JSON has one kind of number."""
    try:
        result = operator.index(value) if hasattr(value, "__index__") and not _no_number(value) else _whole(value)
    except Exception:  # whatever a stranger's conversion raises
        raise UserError("E_PARAMETER", f"{name} must be a whole number; change it.") from None
    return _within(name, result, low, high)


def token_limits(max_length_tokens: Any, thinking_budget: Any) -> tuple[int, int | None]:
    """Both limits of a request's new tokens; without a thinking budget the second is None."""
    length = integer("max_length_tokens", max_length_tokens, 1, MAX_LENGTH_TOKENS)
    return length, None if thinking_budget is None else integer("thinking_budget", thinking_budget, 0)


def texts(name: str, value: Any) -> tuple[str, ...]:
    """``value`` as a tuple of texts; None is none of them, and a single text is one, not its letters."""
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    if isinstance(value, Iterable) and not isinstance(value, Mapping):
        found = tuple(value)
        if all(isinstance(text, str) for text in found):
            return found
    raise UserError("E_PARAMETER", f"{name} must be a list of texts; change it.")


def _within(name: str, value: Any, low: float, high: float | None) -> Any:
    if value < low or (high is not None and value > high):
        bounds = f"at least {low}" if high is None else f"from {low} to {high}"
        raise UserError("E_PARAMETER", f"{name} must be {bounds}; change it.")
    return value


def _float(value: Any) -> float:
    if _no_number(value):
        raise TypeError
    return float(value)


def _whole(value: Any) -> int:
    result = _float(value)
    if not result.is_integer():
        raise ValueError
    return int(result)


def _no_number(value: Any) -> bool:
    """Whether Python would turn ``value`` into a number that nobody wrote."""
    return isinstance(value, bool | str | bytes | bytearray) or "bool" in str(getattr(value, "dtype", ""))
