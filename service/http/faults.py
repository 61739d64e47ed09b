"""An error as an answer: one fault, written in the form of the request's interface.

The native form is problem+json (RFC 9457). OpenAI's SDK reads `error.message`, and retries 409, 429 and 5xx unless
`x-should-retry` forbids it; clients of the Open Inference Protocol read a text in `error`. Both expect 400 for a broken
rule, which is 422 in the native interface.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from service.http.interfaces import Interface
from service.http.routes import interface_of

MEDIA_TYPE = "application/problem+json"
REFUSED_BEFORE_WORK = frozenset({408, 429, 503})
"""Statuses of requests that were refused before any work: they may be sent again."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """An error, independent of the interface."""

    status: int
    title: str
    detail: str
    instance: str | None = None
    errors: Sequence[Mapping[str, str]] | None = None
    """`field` and `message` of each broken rule."""
    more: Mapping[str, float] = field(default_factory=dict)

    @property
    def slug(self) -> str:
        """The title as an identifier."""
        return self.title.lower().replace(" ", "-")


class FaultResponse(Response):
    """A fault's answer. Its form is chosen when it is sent, from the request's path."""

    def __init__(self, fault: Fault, headers: Mapping[str, str] | None = None) -> None:
        self._fault = fault
        self._given_headers = dict(headers or {})
        super().__init__(status_code=fault.status)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        await answer_of(self._fault, interface_of(scope), self._given_headers)(scope, receive, send)


def answer_of(fault: Fault, interface: Interface, headers: Mapping[str, str] | None = None) -> Response:
    """Return a fault's answer in the form of an interface."""
    given = dict(headers or {})
    client_error = 400 if fault.status == 422 else fault.status
    retry = {"x-should-retry": "true" if fault.status in REFUSED_BEFORE_WORK else "false"}
    match interface:
        case Interface.NATIVE:
            return JSONResponse(as_problem(fault), fault.status, given, MEDIA_TYPE)
        case Interface.OPENAI:
            return JSONResponse({"error": as_openai_error(fault)}, client_error, given | retry)
        case Interface.KSERVE:
            return JSONResponse({"error": fault.detail}, client_error, given)
        case Interface.NATIVE_AND_OPENAI:
            both = as_problem(fault) | {"error": as_openai_error(fault)}
            return JSONResponse(both, fault.status, given | retry, MEDIA_TYPE)


def as_problem(fault: Fault) -> dict[str, Any]:
    """Return the members of a problem+json object."""
    problem: dict[str, Any] = {
        "type": f"urn:iddpm:{fault.slug}",
        "title": fault.title,
        "status": fault.status,
        "detail": fault.detail,
    }
    if fault.instance is not None:
        problem["instance"] = fault.instance
    if fault.errors is not None:
        problem["errors"] = [dict(error) for error in fault.errors]
    return problem | dict(fault.more)


def as_openai_error(fault: Fault) -> dict[str, str | None]:
    """Return the members of OpenAI's error object, which also ends a stream."""
    kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    return {
        "message": fault.detail,
        "type": kinds.get(fault.status, "invalid_request_error" if fault.status < 500 else "server_error"),
        "param": fault.errors[0]["field"] if fault.errors else None,
        "code": fault.slug.replace("-", "_"),
    }
