"""The context of one HTTP request, shared by the middlewares as one typed object in the ASGI scope."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.types import Scope

from service.http.door.client import Client

NO_PLACE = "no_place"
"""Key of the ASGI state of a connection, set if more connections are open than the limit allows."""
_KEY = "iddpm"


@dataclass(slots=True)
class RequestContext:
    """One request, from its first middleware to the end of its answer. Each field names who sets it."""

    has_place: bool = True
    """Whether its connection is within the limit of open ones. Set by `context_of`, from the connection's mark."""
    request_id: str = ""
    """X-Request-ID of the answer; "" before it is chosen. Set by `Observe`."""
    client: Client | None = None
    """The client; None if the request was refused before it was identified. Set by `Identify`."""
    idempotency_key: str | None = None
    """Its Idempotency-Key, if it has one. Set by `Idempotency`."""
    status: int | None = None
    """The HTTP status that is logged and counted. Set by `Observe`, or earlier by `ended_as` if the outcome differs
    from the status with which the answer began."""


def context_of(scope: Scope) -> RequestContext:
    """Return the context of an HTTP request. The first caller, the connection or the outermost middleware, creates it.

    A middleware that passes on a copy of the scope passes on the same context.
    """
    state = scope.setdefault("state", {})
    if _KEY not in state:
        state[_KEY] = RequestContext(has_place=NO_PLACE not in state)
    context = state[_KEY]
    assert isinstance(context, RequestContext)  # noqa: S101  # set above
    return context


def client_of_request(scope: Scope) -> Client:
    """Return the client of a request that has passed `Identify`."""
    client = context_of(scope).client
    assert client is not None  # noqa: S101  # set by Identify
    return client


def ended_as(scope: Scope, status: int) -> None:
    """Note the outcome of an answer that has begun: the HTTP status that matches the outcome."""
    context_of(scope).status = status


def status_of(scope: Scope) -> int:
    """Return the status of a request that has passed `Observe`, as it was logged and counted."""
    status = context_of(scope).status
    assert status is not None  # noqa: S101  # set by Observe
    return status
