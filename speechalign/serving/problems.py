"""What the endpoint answers when it does not speak: OpenAI's error body."""

from dataclasses import dataclass
from typing import Any, Literal

ErrorType = Literal[
    "invalid_request_error", "authentication_error", "rate_limit_error", "server_error"
]


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorBody:
    """The fields of `{"error": {...}}`; all four are always there."""

    message: str
    type: ErrorType
    param: str | None
    code: str | None


class Problem(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, body: ErrorBody, headers: dict[str, str] | None = None) -> None:
        super().__init__(body.message)
        self.status, self.body, self.headers = status, body, headers or {}

    def to_json(self) -> dict[str, Any]:
        """Return the body as OpenAI's clients read it."""
        body = self.body
        error = {
            "message": body.message,
            "type": body.type,
            "param": body.param,
            "code": body.code,
        }
        return {"error": error}


def invalid(
    message: str, param: str | None = None, code: str | None = None, status: int = 400
) -> Problem:
    """A mistake of the client's; `param` names the field."""
    body = ErrorBody(message=message, type="invalid_request_error", param=param, code=code)
    return Problem(status, body)


def unknown_model(name: str, known: list[str]) -> Problem:
    """No such policy."""
    message = f"the model {name!r} does not exist; there are {', '.join(known)}"
    return invalid(message, "model", "model_not_found", 404)


def unauthorised(message: str) -> Problem:
    """No key, or a wrong one."""
    body = ErrorBody(
        message=message, type="authentication_error", param=None, code="invalid_api_key"
    )
    return Problem(401, body, {"WWW-Authenticate": "Bearer"})


def too_many(message: str, code: str, retry_after_s: int) -> Problem:
    """The client, or everybody, asks for too much at once."""
    body = ErrorBody(message=message, type="rate_limit_error", param=None, code=code)
    return Problem(429, body, {"Retry-After": str(retry_after_s)})


def closing(retry_after_s: int) -> Problem:
    """The endpoint finishes what it has begun, and ends."""
    body = ErrorBody(
        message="the endpoint is being stopped", type="server_error", param=None, code="closing"
    )
    return Problem(503, body, {"Retry-After": str(retry_after_s)})


def failed(code: str, message: str = "the server failed to speak", status: int = 500) -> Problem:
    """Our own failure; the reason is in the log under the request's id, not here."""
    return Problem(status, ErrorBody(message=message, type="server_error", param=None, code=code))
