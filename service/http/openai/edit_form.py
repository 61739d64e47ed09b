"""Read the form of an edit: fields as text, and pictures with OpenAI's convention of transparency."""

from __future__ import annotations

import json
import re
from typing import Any

from pydantic import ValidationError

from diffusion.config import CheckpointConfig
from formats.given_files import may_be_transparent, read_transparency
from service.errors import InvalidRequest
from service.http.broken_rules import dotted, message_of
from service.http.multipart import read_form
from service.http.openai.schemas import EditRequest
from service.requests.given import reading, shape_of
from service.requests.request_body import classes_in
from service.requests.source import ArraySource, FileSource, Source

LONGEST_TEXT = 1000
"""Characters of a part that may be a number, boolean or object."""
_FILES = frozenset({"image", "mask", "cond"})
_MEMBER = re.compile(r"(\w+)\[(\w+)\]")
"""Name of a part that is a member of an object, as OpenAI's SDKs write it."""


def read_edit(content_type: str, body: bytes) -> EditRequest:
    """Read a form. Slow: call it in the `EncodingPool`.

    Raises:
        MalformedForm: the body is not a form.
        InvalidRequest: a field breaks a rule; names the field, the rule and the allowed values.
    """
    fields: dict[str, Any] = {}
    members: dict[str, dict[str, Any]] = {}
    for name, content in read_form(content_type, body).items():
        if name in _FILES:
            fields[name] = content
        elif (member := _MEMBER.fullmatch(name)) is not None:
            owner, key = member.groups()
            members.setdefault(owner, {})[key] = _typed(owner, _text(name, content))
        else:
            fields[name] = _typed(name, _text(name, content))
    if twice := fields.keys() & members:
        raise InvalidRequest(min(twice), "is given twice")
    try:
        return EditRequest.model_validate(fields | members)
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidRequest(dotted(first["loc"]), message_of(first, EditRequest)) from error


def given_of(body: EditRequest, config: CheckpointConfig) -> dict[str, Source]:
    """Return the given images of an edit, by field. Slow: call it in the `EncodingPool`.

    Without a mask, the image's own transparent pixels are made, as OpenAI documents. If it has none, `strength` or
    `start_timestep` must say where to begin. The alpha channel of models with four channels is data, and never a mask.

    Raises:
        InvalidRequest: a file cannot be read, has another shape, or there is nothing to make.
    """
    shape = shape_of(config.model)
    given: dict[str, Source] = {"image": FileSource(body.image, drop_alpha=body.mask is None)}
    if body.cond is not None:
        given["cond"] = FileSource(body.cond)
    field, file = ("image", body.image) if body.mask is None else ("mask", body.mask)
    if body.mask is not None or (shape[2] != 4 and reading("image", lambda: may_be_transparent(body.image))):
        made = reading(field, lambda: read_transparency(file, shape, fit=body.fit))
        if made.any() or body.mask is not None:
            given["mask"] = ArraySource(made[..., None])
    if "mask" not in given and body.strength is None and body.start_timestep is None:
        raise InvalidRequest(
            "mask", "is required, because `image` has no transparent pixels; or set `strength` to begin with the image"
        )
    return given


def _text(name: str, content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(name, "must be UTF-8") from error


def _typed(name: str, text: str) -> Any:
    """Return the number, boolean or object that a field takes, and that a form can only send as text.

    Other text is returned as it is; it breaks the field's rule, unless the field takes text.
    """
    field = EditRequest.model_fields.get(name)
    if field is None or str in classes_in(field.annotation) or len(text) > LONGEST_TEXT:
        return text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, int | float | dict) else text
