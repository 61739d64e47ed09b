"""From exceptions to answers: one table of statuses and titles, no tracebacks; faults.py says how they look."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice
from typing import Any, NamedTuple

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response

from service.api.faults import Fault, FaultResponse
from service.errors import (
    Aborted,
    ClientLimit,
    DeadlineUnmeetable,
    Draining,
    EngineDead,
    Forbidden,
    ImageFailed,
    InvalidRequest,
    LoadConflict,
    LoadFailed,
    NotFinite,
    QueueFull,
    ServiceError,
    TimedOut,
    Unavailable,
    UnknownModel,
)

MAX_ERRORS = 10
"""More are not listed: an answer must not be longer than the request."""
HTTP_TITLES = {400: "Bad request", 404: "Not found", 405: "Method not allowed", 413: "Body too large"}


class Kind(NamedTuple):
    """How an exception looks on the wire."""

    status: int
    title: str


KINDS: dict[type[ServiceError], Kind] = {
    InvalidRequest: Kind(422, "Invalid request"),
    UnknownModel: Kind(404, "Unknown model"),
    Forbidden: Kind(403, "Forbidden"),
    LoadFailed: Kind(422, "Model cannot be served"),
    LoadConflict: Kind(409, "Conflict"),
    DeadlineUnmeetable: Kind(422, "Deadline cannot be met"),
    QueueFull: Kind(503, "Queue full"),
    ClientLimit: Kind(429, "Too many requests"),
    Draining: Kind(503, "Not accepting requests"),
    ImageFailed: Kind(500, "Image failed"),
    NotFinite: Kind(500, "Image failed"),
    Aborted: Kind(499, "Client closed request"),
    TimedOut: Kind(504, "Took too long"),
    EngineDead: Kind(500, "Engine stopped"),
}


def problem(
    status: int,
    title: str,
    detail: str,
    *,
    instance: str | None = None,
    errors: Sequence[dict[str, str]] | None = None,
    headers: dict[str, str] | None = None,
) -> FaultResponse:
    """Build an error's answer."""
    return FaultResponse(Fault(status=status, title=title, detail=detail, instance=instance, errors=errors), headers)


def install(app: FastAPI) -> None:
    """Answer every error of an app."""
    app.add_exception_handler(ServiceError, _service_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)


def fault_of(error: ServiceError, request: Request) -> Fault:
    """Return what a client is to be told of an error."""
    kind = KINDS[type(error)]
    return Fault(
        status=kind.status,
        title=kind.title,
        detail=str(error),
        instance=_instance(request),
        errors=[{"field": error.field, "message": error.message}] if isinstance(error, InvalidRequest) else None,
        more={"predicted_finish_s": error.predicted_s} if isinstance(error, DeadlineUnmeetable) else {},
    )


async def _service_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServiceError)  # noqa: S101  # registered for it
    headers = {"Retry-After": str(math.ceil(error.retry_after_s))} if isinstance(error, Unavailable) else None
    return FaultResponse(fault_of(error, request), headers)


async def _validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)  # noqa: S101
    found = error.errors()
    if any(item["type"] == "json_invalid" for item in found):
        reason = found[0].get("ctx", {}).get("error", "syntax error")
        return problem(400, "Malformed JSON", f"the body is not valid JSON: {reason}", instance=_instance(request))
    fields = _fields(request)
    # A field may break a rule thousands of times, and thousands of fields may be unknown: few are put into words
    broken: dict[tuple[str, str], dict[str, Any]] = {}
    for item in found:
        broken.setdefault((_field(item["loc"]), item["type"]), item)
    listed = islice(broken.items(), MAX_ERRORS)
    errors = [{"field": field, "message": _message(item, fields)} for (field, _), item in listed]
    detail = "; ".join(f"{e['field']}: {e['message']}" for e in errors)
    return problem(422, "Invalid request", detail, instance=_instance(request), errors=errors)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101
    if error.status_code == 400 and error.__cause__ is not None:  # how FastAPI says that it could not read a body
        detail = f"the body is not valid JSON: {_unreadable(error.__cause__)}"
        return problem(400, "Malformed JSON", detail, instance=_instance(request))
    return problem(
        error.status_code,
        HTTP_TITLES.get(error.status_code, "Error"),
        str(error.detail),
        instance=_instance(request),
        headers=dict(error.headers or {}),
    )


def _unreadable(cause: BaseException) -> str:
    if isinstance(cause, RecursionError):
        return "nested too deeply"
    return "not UTF-8" if isinstance(cause, UnicodeDecodeError) else "a number is too long"


def _instance(request: Request) -> str | None:
    request_id = getattr(request.state, "request_id", None)
    return None if request_id is None else f"urn:iddpm:request:{request_id}"


def _field(location: Sequence[str | int]) -> str:
    # pydantic puts the member of a union it tried between the field and the error; people know the field only
    named = [part for part in location if part != "body"]
    return "body" if not named else str(named[0])[:60]


def _fields(request: Request) -> list[str]:
    """List the fields that a body of the request's route may have."""
    route = request.scope.get("route")
    body = route.body_field.field_info.annotation if isinstance(route, APIRoute) and route.body_field else None
    fields = body.model_fields if isinstance(body, type) and issubclass(body, BaseModel) else {}
    return [field.alias or name for name, field in fields.items()]


def _message(item: dict[str, Any], fields: Sequence[str]) -> str:
    context = item.get("ctx", {})
    text = str(item["msg"])
    if item["type"] == "extra_forbidden":
        return f"unknown field; allowed: {', '.join(fields)}"
    if "expected" in context and item["type"] == "literal_error":
        return f"must be {context['expected']}; got {_short(item.get('input'))}"
    rule = f"{text[:1].lower()}{text[1:]}"
    return rule if item["type"] == "missing" else f"{rule}; got {_short(item.get('input'))}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
