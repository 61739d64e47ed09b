"""What the requests of a load ask for: kinds of requests, and how often each is sent."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from diffusion.noise import MAX_SEED
from diffusion.quoting import in_words
from formats.checkpoint_config import describe_validation_error
from service.requests.generate_request import GenerateRequest

ANSWERED_AS_STREAM = ("stream", "preview_every")
"""Fields that a load cannot have: the latency of a request is that of its complete answer."""


@dataclass(frozen=True, kw_only=True)
class RequestKind:
    """A kind of request."""

    name: str
    weight: float
    """Its share of the requests is weight / sum of all weights."""
    fields: Mapping[str, Any]
    """Fields of `POST /v1/generate`."""


DEFAULT_MIXTURE = (RequestKind(name="defaults", weight=1.0, fields={}),)
"""One image, with the service's default for everything else."""


def read_mixture(texts: Sequence[str]) -> tuple[RequestKind, ...]:
    """Read the kinds of requests from the command line.

    Args:
        texts: each one a kind, NAME=VALUE,..., or the path of a JSON file with a list of kinds as objects. Names are
            those of the request's fields, `weight` (default 1) and `name` (default: the text of the fields).

    Raises:
        ValueError: a text, a file or a field is invalid, or two kinds have the same name.
        OSError: a file cannot be read.
    """
    kinds = [kind for text in texts for kind in (_read_file(Path(text)) if Path(text).is_file() else _read_text(text))]
    names = [kind.name for kind in kinds]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"mix: two kinds of requests are called {name!r}; give them different names (name=...)")
    return tuple(kinds) or DEFAULT_MIXTURE


def draw_request(kinds: Sequence[RequestKind], seed: int, number: int) -> tuple[RequestKind, dict[str, Any]]:
    """Draw a request as a function of the load's seed and the request's number.

    Returns:
        Its kind, and its fields with a seed of its own, unless the kind has one.
    """
    draw = random.Random(f"{seed}/{number}")  # noqa: S311  # nothing secret
    (kind,) = draw.choices(kinds, [kind.weight for kind in kinds])
    return kind, {"seed": draw.randint(0, MAX_SEED), **kind.fields}


def _read_text(text: str) -> list[RequestKind]:
    entry: dict[str, Any] = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        if not equals or not name.strip():
            raise ValueError(
                f"mix: must be a JSON file that exists, or NAME=VALUE,... (a file if a value has commas); got {text!r}"
            )
        entry[name.strip()] = _value(value.strip())
    return [_kind(entry, f"mix: {text!r}")]


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _read_file(path: Path) -> list[RequestKind]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # UnicodeDecodeError is one
        raise ValueError(f"mix: {path} is not JSON: {error}") from error
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"mix: {path} must hold a list of objects, one per kind of request")
    return [_kind(entry, f"mix: {path}, kind {number}") for number, entry in enumerate(entries, 1)]


def _kind(entry: Mapping[str, Any], where: str) -> RequestKind:
    fields = {name: value for name, value in entry.items() if name not in ("name", "weight")}
    weight, name = entry.get("weight", 1), entry.get("name", _text_of(fields))
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
        raise ValueError(f"{where}: weight: must be a number above 0; got {weight!r}")
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"{where}: name: must be a text; got {name!r}")
    known = [field.alias or name for name, field in GenerateRequest.model_fields.items()]
    for field in fields:
        if field in ANSWERED_AS_STREAM:
            raise ValueError(f"{where}: {field}: must be left out; latency is measured to the complete answer")
        if field not in known:
            raise ValueError(f"{where}: {field}: is unknown; must be name, weight, {in_words(known)}")
    try:
        GenerateRequest.model_validate(fields)
    except ValidationError as error:
        raise ValueError(f"{where}: {describe_validation_error(error)}") from error
    return RequestKind(name=name, weight=float(weight), fields=fields)


def _text_of(fields: Mapping[str, Any]) -> str:
    shown = (f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in fields.items())
    return ",".join(shown) or DEFAULT_MIXTURE[0].name
