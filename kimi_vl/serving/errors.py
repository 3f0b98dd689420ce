"""Errors as clients of OpenAI's API read them: a status, and an object with message, type, param and code.

Everything that is refused or fails ends here; texts of other libraries, paths and content never leave.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import UserError

INVALID_REQUEST = "invalid_request_error"
RATE_LIMIT = "rate_limit_error"
UNAVAILABLE = "service_unavailable_error"
API_ERROR = "api_error"

_ELSEWHERE = {"E_PARAMETER": None, "E_GRAMMAR": "response_format"}
"""The parameter at fault, where nothing nearer is known, for mistakes that are not in the messages."""


@dataclass(eq=False)
class ApiError(Exception):
    """A request that is refused or has failed. ``param`` is the path of the field at fault."""

    status: int
    message: str
    type: str = INVALID_REQUEST
    code: str | None = None
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.message

    def object(self) -> dict[str, Any]:
        """``{"error": …}``, the body of the answer."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def body(self) -> bytes:
        return json.dumps(self.object()).encode()


def bad_request(param: str | None, message: str, code: str = "e_parameter") -> ApiError:
    """A mistake in the field ``param``; ``message`` is one sentence that says what to do."""
    return ApiError(400, message, code=code, param=param)


def unsupported(param: str, message: str) -> ApiError:
    """A field that asks for something this server cannot do."""
    return ApiError(400, message, code="unsupported_parameter", param=param)


def unavailable(message: str, retry_after: int = 5) -> ApiError:
    """No request is served now; another try, or another server, may succeed."""
    headers = {"Retry-After": str(retry_after), "x-should-retry": "true"}
    return ApiError(503, message, UNAVAILABLE, "service_unavailable", headers=headers)


def overloaded(message: str, retry_after: int) -> ApiError:
    """More than is taken on at a time."""
    headers = {"Retry-After": str(retry_after), "x-should-retry": "true"}
    return ApiError(429, message, RATE_LIMIT, "overloaded", headers=headers)


def from_exception(error: BaseException, request_id: str, retry_after: int = 1) -> ApiError:
    """What a client is told about any error; ``retry_after`` seconds are proposed where the server is overloaded."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UserError):
        return _of_user_error(error, retry_after)
    return ApiError(500, f"the server failed on this request; its id is {request_id}.", API_ERROR, "internal_error")


def _of_user_error(error: UserError, retry_after: int) -> ApiError:
    if error.code == "E_OVERLOADED":
        cause = getattr(error, "cause", "queue")
        if cause == "deadline":  # a client that tries again by itself would take as long again
            return ApiError(504, error.message, API_ERROR, "deadline_exceeded", headers={"x-should-retry": "false"})
        refusal = overloaded(error.message, retry_after)
        return replace(refusal, code="out_of_memory") if cause == "memory" else refusal
    code = "context_length_exceeded" if error.code == "E_PROMPT_TOO_LONG" else error.code.lower()
    return bad_request(error.parameter or _ELSEWHERE.get(error.code, "messages"), error.message, code)


def with_param(error: UserError, param: str) -> ApiError:
    """``error``, found in the field ``param``."""
    return replace(_of_user_error(error, 1), param=param)
