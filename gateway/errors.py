"""What can go wrong between a client and an engine.

GatewayError
├── StartupFailed       the gateway cannot start: port in use, bad file (exit code 2)
├── BadRequest          400 INVALID_ARGUMENT     not JSON, no model, a header that makes no sense
│   ├── BodyTooLarge    413 RESOURCE_EXHAUSTED
│   └── Malformed       400                      not HTTP/1.1 as RFC 9112 has it; the connection ends
│       ├── TooSlow         408                  the request did not arrive in time
│       ├── TargetTooLong   414
│       ├── NotExpected     417                  `expect` of something else than 100-continue
│       └── HeadTooLarge    431
├── InvalidKey          401 UNAUTHENTICATED      no API key, or none that is valid
├── NotAllowed          403 PERMISSION_DENIED    the key may not use this model, or see this page
├── NoSuchModel         404 NOT_FOUND            with the nearest names
├── NoSuchResponse      404 NOT_FOUND            nobody holds the stored response
├── NoSuchRoute         404 UNIMPLEMENTED
│   ├── NotSupported    404                      the model's engine has no such path
│   └── WrongMethod     405
├── Overloaded          429 RESOURCE_EXHAUSTED   the model's queue is full
├── LimitReached        429 RESOURCE_EXHAUSTED   by the tenant
│   ├── RateLimited                              its requests or tokens per minute, or at a time
│   └── QuotaSpent                               its tokens for the day or month
├── Unavailable         503 UNAVAILABLE          no replica (yet), all busy for too long, shutting down
│   ├── EngineUnreachable                        nobody listens at the endpoint
│   ├── WouldBeLate                              the queue is longer than the client waits
│   └── UploadsFull                              too many bytes of requests are arriving
├── LateRefusal         as the engine says       it refused what had a status already: a stream that waited
├── EngineBroke         502 UNAVAILABLE          the engine went away while it answered
└── DeadlineExceeded    504 DEADLINE_EXCEEDED    the client's own time limit has passed

Each knows its HTTP status, its gRPC status and OpenAI's `type` and `code`. They are raised where the
fact is known and turned into a response at the edges: `http_api`, `http_server`, `grpc_api`,
`__main__`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

from gateway.bodies import Error, ErrorBody


class GatewayError(Exception):
    """Base of this package's errors; by itself, a bug of ours."""

    exit_code = 1
    status = 500
    grpc_status = "INTERNAL"
    type = "internal_error"
    code: str | None = None

    def __init__(
        self, message: str, *, param: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    @property
    def more_headers(self) -> Mapping[str, str]:
        """Further headers of the answer (gRPC: trailing metadata)."""
        return {}

    @property
    def retry_after(self) -> str | None:
        """The `retry-after` header: whole seconds, at least one."""
        return None if self.retry_after_s is None else str(max(1, math.ceil(self.retry_after_s)))

    def body(self) -> ErrorBody:
        """OpenAI's error body."""
        error: Error = {
            "message": self.message,
            "type": self.type,
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}


class StartupFailed(GatewayError):
    """The gateway cannot start; the message says what to change."""

    exit_code = 2


class BadRequest(GatewayError):
    """The client must change its request."""

    status = 400
    grpc_status = "INVALID_ARGUMENT"
    type = "invalid_request_error"


class BodyTooLarge(BadRequest):
    """More bytes than the gateway takes."""

    status = 413
    grpc_status = "RESOURCE_EXHAUSTED"
    code = "request_too_large"


class Malformed(BadRequest):
    """Not HTTP/1.1 as RFC 9112 has it: what follows on the connection cannot be trusted."""

    code = "malformed_request"


class TooSlow(Malformed):
    """The request did not arrive in time."""

    status = 408
    code = "request_timeout"


class TargetTooLong(Malformed):
    """The path and query are longer than any of ours."""

    status = 414
    code = "uri_too_long"


class NotExpected(Malformed):
    """The client waits for something that this server never says."""

    status = 417
    code = "expectation_failed"


class HeadTooLarge(Malformed):
    """Too many headers, or too long ones."""

    status = 431
    code = "headers_too_large"


class InvalidKey(GatewayError):
    """No API key, or none that is valid. Nothing of what was sent is repeated."""

    status = 401
    grpc_status = "UNAUTHENTICATED"
    type = "invalid_request_error"
    code = "invalid_api_key"

    @property
    def more_headers(self) -> Mapping[str, str]:
        """How to authenticate."""
        return {"www-authenticate": 'Bearer realm="bora"'}


class NotAllowed(GatewayError):
    """The key is valid, but not for this."""

    status = 403
    grpc_status = "PERMISSION_DENIED"
    type = "invalid_request_error"
    code = "permission_denied"


class NoSuchModel(GatewayError):
    """Nobody serves a model of that name."""

    status = 404
    grpc_status = "NOT_FOUND"
    type = "invalid_request_error"
    code = "model_not_found"


class NoSuchResponse(GatewayError):
    """No endpoint is known to hold the stored response."""

    status = 404
    grpc_status = "NOT_FOUND"
    type = "invalid_request_error"
    code = "response_not_found"


class NoSuchRoute(GatewayError):
    """No such path in the API."""

    status = 404
    grpc_status = "UNIMPLEMENTED"
    type = "invalid_request_error"
    code = "unknown_url"


class NotSupported(NoSuchRoute):
    """The gateway passes this on, but the model's engine does not have it.

    Not 501: OpenAI's clients would try that again.
    """

    code = "endpoint_not_supported"


class WrongMethod(NoSuchRoute):
    """The path exists, for another HTTP method."""

    status = 405
    code = "method_not_allowed"


class Overloaded(GatewayError):
    """More requests wait for the model than its queue holds."""

    status = 429
    grpc_status = "RESOURCE_EXHAUSTED"
    type = "rate_limit_error"
    code = "queue_full"


class LimitReached(GatewayError):
    """The tenant has had what it may have, wherever there are free places. After `retry_after_s`, more."""

    status = 429
    grpc_status = "RESOURCE_EXHAUSTED"
    type = "rate_limit_error"


class RateLimited(LimitReached):
    """The tenant asks faster than it may. `headers` tell its limits and what is left."""

    code = "rate_limit_exceeded"

    def __init__(
        self, message: str, *, retry_after_s: float, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self._headers = headers or {}

    @property
    def more_headers(self) -> Mapping[str, str]:
        """`x-ratelimit-*`, as OpenAI has them."""
        return self._headers


class QuotaSpent(LimitReached):
    """The tenant has used up its tokens of this day or month."""

    type = "insufficient_quota"
    code = "insufficient_quota"


class Unavailable(GatewayError):
    """Nothing can answer now, but something may after `retry_after_s`."""

    status = 503
    grpc_status = "UNAVAILABLE"
    type = "server_error"
    code = "unavailable"


class EngineUnreachable(Unavailable):
    """No connection to the endpoint: nothing was sent."""

    code = "engine_unreachable"


class WouldBeLate(Unavailable):
    """More time would pass in the queue than the client gives."""

    code = "deadline_out_of_reach"


class UploadsFull(Unavailable):
    """More bytes of requests are arriving than one worker holds; this one is the largest of them."""

    code = "uploads_full"


class LateRefusal(GatewayError):
    """The engine refused the request, whose client was already told to wait in a stream.

    An error event says so in the engine's words, with its status as `code`.
    """

    type = "invalid_request_error"

    def __init__(self, status: int, body: bytes) -> None:
        try:
            told = json.loads(body)
        except (ValueError, RecursionError):
            told = None
        error = told.get("error", told) if isinstance(told, dict) else None
        self._error = error if isinstance(error, dict) else {}
        message = self._error.get("message") or body[:300].decode(errors="replace")
        super().__init__(str(message or f"the engine answered {status}"))
        self.status = status
        self.grpc_status = "RESOURCE_EXHAUSTED" if status == 429 else "INVALID_ARGUMENT"
        self.code = str(self._error.get("code") or status)

    def body(self) -> ErrorBody:
        """The engine's own fields, where it has them."""
        error: Error = {
            "message": self.message,
            "type": str(self._error.get("type") or self.type),
            "param": self._error.get("param"),
            "code": self.status,
        }
        return {"error": error}


class EngineBroke(GatewayError):
    """The engine took the request and went away, or does not speak HTTP."""

    status = 502
    grpc_status = "UNAVAILABLE"
    type = "server_error"
    code = "engine_failed"


class DeadlineExceeded(GatewayError):
    """The time that the client gave has passed."""

    status = 504
    grpc_status = "DEADLINE_EXCEEDED"
    type = "timeout_error"
    code = "deadline_exceeded"
