"""Turn pydantic's errors into messages that name the field, the rule, and the value as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from pydantic import BaseModel

from diffusion.quoting import quoted
from service.requests.request_body import TOO_MANY_FIELDS, classes_in

MAX_NAME = 60
_RULES = {
    "model_attributes_type": "must be a JSON object",
    "model_type": "must be a JSON object",
    "dict_type": "must be a JSON object",
    "list_type": "must be a list",
    "bool_type": "must be true or false",
    "string_unicode": "must be a string of Unicode characters",
}
"""Messages by type of pydantic's error; they replace its own, which name Python types."""

Location = Sequence[str | int]


def message_of(item: Mapping[str, Any], body: type[BaseModel] | None) -> str:
    """Return the message for a broken rule, without the field.

    Args:
        item: one of pydantic's errors.
        body: the model that the body was validated against, if there is one.
    """
    context = item.get("ctx", {})
    text = str(item["msg"])
    if item["type"] == TOO_MANY_FIELDS:  # the input would be long
        return text
    if item["type"] == "missing":
        return "field required"
    if item["type"] == "extra_forbidden":
        return f"unknown field; allowed: {', '.join(_allowed(body, _inside(item['loc'])))}"
    if item["type"] == "literal_error":
        rule = f"must be {context['expected'].replace(chr(39), chr(34))}"  # our own messages contain no quotation marks
    else:
        rule = _RULES.get(item["type"], f"{text[:1].lower()}{text[1:]}")
    return f"{rule}; got {quoted(item.get('input'))}"


def field_of(location: Location, body: type[BaseModel] | None) -> str:
    """Return the name of the field that a location is in, after the names of the objects that it is in."""
    inside = _inside(location)
    depth = 1
    for part, following in pairwise(inside):
        body = _object_in(body, part)
        if body is None or not isinstance(following, str):
            break  # what follows may be the member of a union that pydantic tried
        depth += 1
    return dotted(inside[:depth])


def dotted(location: Location) -> str:
    """Return a location in a body as text: inputs.0.name."""
    parts = (str(part)[:MAX_NAME] for part in location)
    return ".".join(part if part.isprintable() else quoted(part) for part in parts) or "body"


def _inside(location: Location) -> Location:
    """Return a location without the source of the fields, which FastAPI puts before it."""
    return location[1:] if location and location[0] in ("body", "path", "query", "header") else location


def _allowed(body: type[BaseModel] | None, location: Location) -> list[str]:
    """List the fields of the object that a field is in."""
    for part in location[:-1]:
        if isinstance(part, str):
            body = _object_in(body, part)
    return [] if body is None else [field.alias or name for name, field in body.model_fields.items()]


def _object_in(body: type[BaseModel] | None, name: str | int) -> type[BaseModel] | None:
    """Return the model of the objects that a field holds; None: it holds none."""
    field = body.model_fields.get(name) if body is not None and isinstance(name, str) else None
    models = () if field is None else classes_in(field.annotation)
    return next((model for model in models if issubclass(model, BaseModel)), None)
