"""Errors as clients see them: OpenAI's error object and the right status. No internals in any of them."""

from __future__ import annotations

from typing import Any

import msgspec
from caesura.runtime.errors import (
    CaesuraError,
    ContextClosed,
    ContextTooLong,
    DeadlineExceeded,
    EngineStopped,
    GrammarError,
    InvalidRequest,
    Overloaded,
)
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

MAX_MESSAGE_CHARS = 1000
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    499: "request_cancelled",
    503: "service_unavailable",
}


class ApiError(Exception):
    """A refusal with its HTTP status. ``param`` names the field at fault."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        """The error object. ``retryable`` is for clients of the native protocol."""
        return {
            "error": {
                "message": self.message[:MAX_MESSAGE_CHARS],
                "type": _TYPES.get(self.status, "server_error"),
                "param": self.param,
                "code": self.code,
                "retryable": self.status in (408, 409, 429, 503),
            }
        }

    def response(self) -> Response:
        """The whole answer."""
        headers = {}
        if self.retry_after_s is not None:
            headers["retry-after"] = str(self.retry_after_s)
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return Response(msgspec.json.encode(self.body()), self.status, headers, media_type="application/json")


def as_api_error(error: BaseException) -> ApiError:
    """What a client is told about any exception. Only refusals of the caller's input carry their own text."""
    match error:
        case ApiError():
            return error
        case ClientDisconnect():
            return ApiError(499, "the client closed the connection")
        case HTTPException():
            return ApiError(error.status_code, str(error.detail))
        case GrammarError():
            return ApiError(400, str(error), code="invalid_grammar")
        case ContextTooLong():
            return ApiError(400, str(error), code="context_length_exceeded")
        case InvalidRequest():
            return ApiError(400, str(error))
        case DeadlineExceeded() | TimeoutError():
            return ApiError(408, "the request outlasted its deadline", code="deadline_exceeded")
        case EngineStopped():
            return ApiError(503, "the engine is not available; try again", code="engine_unavailable", retry_after_s=1)
        case Overloaded():
            return ApiError(503, str(error), code="overloaded", retry_after_s=1)
        case ContextClosed():
            return ApiError(503, "the context was closed while the request used it", code="context_closed")
        case CaesuraError():
            return ApiError(500, "the server failed to answer this request")
        case _:
            return ApiError(500, "the server failed to answer this request")
