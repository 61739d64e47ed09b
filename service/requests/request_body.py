"""The base class of all request bodies: unknown fields are rejected, and null means absent."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError

MAX_FIELDS = 100
"""Of an object in a body; all that exist are fewer."""
TOO_MANY_FIELDS = "too_many_fields"
"""Type of the error for more; its message is complete."""
_ANNOTATIONS = frozenset({"default", "description", "title"})


class RequestBody(BaseModel):
    """A request body, or an object in one. Null in an optional field is the same as leaving the field out."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _leave_out_nulls(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if len(value) > MAX_FIELDS:  # an error is made for each unknown one
            raise PydanticCustomError(TOO_MANY_FIELDS, f"must have at most {MAX_FIELDS} fields; got {len(value)}")
        optional = {field.alias or name for name, field in cls.model_fields.items() if not field.is_required()}
        return {name: item for name, item in value.items() if item is not None or name not in optional}

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Return the JSON schema, in which every optional field may be null."""
        schema = handler(core_schema)
        described = handler.resolve_ref_schema(schema)
        for name, field in described.get("properties", {}).items():
            if name not in described.get("required", ()):
                described["properties"][name] = _or_null(field)
        return schema


def classes_in(annotation: Any) -> Iterator[type]:
    """Yield the classes in an annotation: int and float of Annotated[int | float, ...] | None."""
    if isinstance(annotation, type):
        yield annotation
    for argument in get_args(annotation):
        yield from classes_in(argument)


def _or_null(field: JsonSchemaValue) -> JsonSchemaValue:
    null = {"type": "null"}
    if null in field.get("anyOf", ()):
        return field
    value = {key: item for key, item in field.items() if key not in _ANNOTATIONS}
    return {"anyOf": [value, null]} | {key: item for key, item in field.items() if key in _ANNOTATIONS}
