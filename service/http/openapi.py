"""Schemas for the OpenAPI document of routes whose bodies FastAPI cannot infer."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel


def inlined(model: type[BaseModel]) -> dict[str, Any]:
    """Return a model's JSON schema without references, usable anywhere in a document."""
    schema = model.model_json_schema()
    definitions = schema.pop("$defs", {})

    def resolve(part: Any) -> Any:
        if isinstance(part, list):
            return [resolve(item) for item in part]
        if not isinstance(part, dict):
            return part
        if "$ref" in part:
            rest = {key: value for key, value in part.items() if key != "$ref"}
            return resolve(definitions[part["$ref"].removeprefix("#/$defs/")] | rest)
        return {key: resolve(value) for key, value in part.items()}

    return resolve(schema)


def one_of(*models: type[BaseModel]) -> dict[str, Any]:
    """Return the schema of a union of models."""
    return {"anyOf": [inlined(model) for model in models]}
