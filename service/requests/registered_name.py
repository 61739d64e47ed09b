"""A request field restricted to the names of a registry, which is read for every validation and every schema."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticKnownError, core_schema

from diffusion.quoting import in_words


@dataclass(frozen=True, eq=False)
class NameIn:
    """Annotation of a string field that must be one of the names. Errors and schema equal those of a `Literal`."""

    names: Collection[str]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Return the schema that validates a value."""
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Return the JSON schema."""
        return {"type": "string", "enum": list(self.names)}

    def _check(self, value: Any) -> str:
        if isinstance(value, str) and value in self.names:
            return value
        raise PydanticKnownError("literal_error", {"expected": in_words(f"'{name}'" for name in self.names)})
