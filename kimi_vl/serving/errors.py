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

_IN_MESSAGES = ("E_PROMPT_", "E_MESSAGES_", "E_IMAGE_", "E_TOO_MANY_IMAGES")
"""Codes of mistakes in the messages: which parameter is at fault where nothing nearer is known."""


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
    return ApiError(503, message, UNAVAILABLE, "service_unavailable", headers={"Retry-After": str(retry_after)})


def overloaded(message: str, retry_after: int) -> ApiError:
    """More than is taken on at a time."""
    return ApiError(429, message, RATE_LIMIT, "overloaded", headers={"Retry-After": str(retry_after)})


def from_exception(error: BaseException, request_id: str, retry_after: int = 1) -> ApiError:
    """What a client is told about any error; ``retry_after`` seconds are proposed where the server is overloaded."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UserError):
        return _of_user_error(error, retry_after)
    return ApiError(500, f"the server failed on this request; its id is {request_id}.", API_ERROR, "internal_error")


def _of_user_error(error: UserError, retry_after: int) -> ApiError:
    if error.code == "E_OVERLOADED":
        return overloaded(error.message, retry_after)
    code = "context_length_exceeded" if error.code == "E_PROMPT_TOO_LONG" else error.code.lower()
    return bad_request("messages" if error.code.startswith(_IN_MESSAGES) else None, error.message, code)


def with_param(error: UserError, param: str) -> ApiError:
    """``error``, found in the field ``param``."""
    return replace(_of_user_error(error, 1), param=param)
