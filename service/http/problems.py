"""Map exceptions to answers by one table of statuses and titles; faults.py formats them for each interface."""

from __future__ import annotations

import math
from collections.abc import Sequence
from http import HTTPStatus
from itertools import islice
from typing import Any, NamedTuple

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response

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
    MalformedForm,
    MalformedJson,
    NotAcceptable,
    NotFinite,
    QueueFull,
    ServiceError,
    TimedOut,
    TooLong,
    Unavailable,
    UnknownModel,
)
from service.http.broken_rules import field_of, message_of
from service.http.door.context import context_of
from service.http.faults import Fault, FaultResponse
from service.http.interfaces import Interface
from service.http.routes import printable, routes_of
from service.requests.generate_request import GenerateRequest

MAX_ERRORS = 10
"""Maximum number of broken rules in an answer, so that it is not longer than the request."""
BASE_URL = "base_url of OpenAI's clients is the service's address and /v1, once"
ROUTES_THAT_GENERATE = (
    f"images come from POST /v1/generate, from POST /v1/images/generations and /v1/images/edits ({BASE_URL}), and from "
    "POST /v2/models/{model}/infer (KServe); GET /openapi.json lists all routes"
)
HTTP_TITLES = {400: "Bad request", 403: "Forbidden", 404: "Not found", 405: "Method not allowed", 413: "Body too large"}


class Kind(NamedTuple):
    """Status and title of an exception's answer."""

    status: int
    title: str


KINDS: dict[type[ServiceError], Kind] = {
    MalformedJson: Kind(400, "Malformed JSON"),
    MalformedForm: Kind(400, "Malformed form"),
    InvalidRequest: Kind(422, "Invalid request"),
    NotAcceptable: Kind(406, "Not acceptable"),
    UnknownModel: Kind(404, "Unknown model"),
    Forbidden: Kind(403, "Forbidden"),
    LoadFailed: Kind(422, "Model cannot be served"),
    LoadConflict: Kind(409, "Conflict"),
    DeadlineUnmeetable: Kind(422, "Deadline cannot be met"),
    TooLong: Kind(422, "Would take too long"),
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
    """Return the answer to an error."""
    return FaultResponse(Fault(status=status, title=title, detail=detail, instance=instance, errors=errors), headers)


def install(app: FastAPI) -> None:
    """Register the handlers that answer every error of an app."""
    app.add_exception_handler(ServiceError, _service_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)


def fault_of(error: ServiceError, request: Request) -> Fault:
    """Return the fault that describes an error to the client."""
    kind = KINDS[type(error)]
    return Fault(
        status=kind.status,
        title=kind.title,
        detail=str(error),
        instance=_instance(request),
        errors=[{"field": error.field, "message": error.message}] if isinstance(error, InvalidRequest) else None,
        more={"predicted_finish_s": error.predicted_s} if isinstance(error, DeadlineUnmeetable | TooLong) else {},
    )


async def _service_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServiceError)  # noqa: S101  # registered for it
    headers = {"Retry-After": str(math.ceil(error.retry_after_s))} if isinstance(error, Unavailable) else None
    return FaultResponse(fault_of(error, request), headers)


async def _validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)  # noqa: S101
    body = _body_model(request)
    # There may be thousands of errors; only the first of each listed field is described
    broken: dict[str, dict[str, Any]] = {}
    for item in error.errors():
        broken.setdefault(field_of(item["loc"], body), item)
    listed = islice(broken.items(), MAX_ERRORS)
    errors = [{"field": field, "message": message_of(item, body)} for field, item in listed]
    fields: dict[str, list[str]] = {}  # by message: a rule that several fields break is stated once
    for entry in errors:
        fields.setdefault(entry["message"], []).append(entry["field"])
    detail = "; ".join(f"{', '.join(names)}: {message}" for message, names in fields.items())
    return problem(422, "Invalid request", detail, instance=_instance(request), errors=errors)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101
    if isinstance(error.__cause__, ServiceError):  # FastAPI wraps what JsonRequest raises
        return await _service_error(request, error.__cause__)
    return problem(
        error.status_code,
        HTTP_TITLES.get(error.status_code, "Error"),
        _detail(request, error),
        instance=_instance(request),
        headers=dict(error.headers or {}),
    )


def _detail(request: Request, error: HTTPException) -> str:
    """Return the detail of an error; if no route took the request, name the path and the routes that exist."""
    path = request.scope["path"]
    call = f"{request.method} {printable(path)}"
    if error.status_code == 405:
        return f"{call}: this route takes {(error.headers or {}).get('Allow', 'no such method')}"
    if error.status_code != 404 or error.detail != HTTPStatus.NOT_FOUND.phrase:
        return str(error.detail)
    nearest = routes_of(request.scope).nearest(path)
    if nearest is None:
        return f"there is no {call} here; {ROUTES_THAT_GENERATE}"
    meant, route = nearest
    there_is = f"there is no {call} here, but there is {', '.join(sorted(route.methods))} {printable(meant)}"
    of_openai = route.interface in (Interface.OPENAI, Interface.NATIVE_AND_OPENAI)
    return f"{there_is}; {BASE_URL}" if of_openai else there_is


def _instance(request: Request) -> str | None:
    request_id = context_of(request.scope).request_id
    return f"urn:iddpm:request:{request_id}" if request_id else None


def _body_model(request: Request) -> type[BaseModel] | None:
    """Return the model of the body that the request's route takes, or of the native request that it makes of one."""
    route = request.scope.get("route")
    if not isinstance(route, APIRoute):
        return None
    body = GenerateRequest if route.body_field is None else route.body_field.field_info.annotation
    return body if isinstance(body, type) and issubclass(body, BaseModel) else None
