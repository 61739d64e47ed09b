"""Turn pydantic's errors into messages that name the field, the rule, and the value as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, get_args

from pydantic import BaseModel

from diffusion.quoting import quoted

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
        field = body.model_fields.get(part) if body is not None and isinstance(part, str) else None
        body = None if field is None else next(_models(field.annotation), None)
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
        if isinstance(part, str) and body is not None:
            field = body.model_fields.get(part)
            body = next(_models(field.annotation), None) if field is not None else None
    return [] if body is None else [field.alias or name for name, field in body.model_fields.items()]


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the models in an annotation: X in X | None or list[X]."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models(argument)
