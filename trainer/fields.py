"""The fields of a training configuration, for people: name, type, default, allowed values, meaning.

All of it is read from the classes of the configuration: their annotations, and the docstring after each field.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from diffusion.config import ClassifierConfig, DiffusionConfig, ModelConfig, SamplingDefaults
from trainer.config import TrainConfig
from trainer.data.options import DataConfig
from trainer.decided import DECIDED

DERIVED = "derived"
"""Stands for the default of fields that the data and other fields determine."""
REQUIRED = "by preset"
"""Stands for the default of fields that have none, so that every preset sets them."""
PARTS: Mapping[str, type[BaseModel]] = {"diffusion": DiffusionConfig, "data": DataConfig, "sampling": SamplingDefaults}
WORDS = {"None": "null", "True": "true", "False": "false"}
"""Values in docstrings, and how they are written in `--set`."""
TYPES = {"integer": "integer", "number": "number", "boolean": "true or false", "string": "text", "null": "null"}
BOUNDS = {"minimum": ">= {}", "exclusiveMinimum": "> {}", "maximum": "<= {}", "exclusiveMaximum": "< {}"}


@dataclass(frozen=True)
class TrainField:
    """A field that `--set` takes."""

    name: str
    """With the part it belongs to, e.g. model.dropout."""
    type: str
    default: str
    """As in `--set`; or DERIVED, or REQUIRED."""
    allowed: str
    """Values or bounds; empty: any value of the type, as far as other fields allow it."""
    meaning: str
    """The first sentence of its description."""


def train_fields() -> list[TrainField]:
    """Return all fields in the order of the configuration: the network, the process, training, data, log.

    Those of the network are the UNet's, and then the ones that only a classifier has.
    """
    fields: list[TrainField] = []
    for name, field in TrainConfig.model_fields.items():
        if name == "model":
            fields += _fields_of(ModelConfig, "model.", {})
            only = ClassifierConfig.model_fields.keys() - ModelConfig.model_fields.keys()
            fields += [found for found in _fields_of(ClassifierConfig, "model.", {}) if found.name[6:] in only]
        elif name in PARTS:
            fields += _fields_of(PARTS[name], f"{name}.", field.default.model_dump(mode="json"))
        else:
            fields += [found for found in _fields_of(TrainConfig, "", {}) if found.name == name]
    return fields


def _fields_of(config: type[BaseModel], prefix: str, defaults: Mapping[str, Any]) -> Iterator[TrainField]:
    schema, meanings = config.model_json_schema(), _docstrings(config)
    for name in config.model_fields:
        described = schema["properties"][name]
        if "$ref" in described or name == "model":
            continue  # a part, which has fields of its own
        default = _default(f"{prefix}{name}", defaults.get(name, described.get("default", ...)))
        meaning = "" if name not in meanings else _first_sentence(meanings[name])
        yield TrainField(f"{prefix}{name}", _type(described), default, _allowed(described), meaning)


def _default(name: str, value: Any) -> str:
    if name in DECIDED and name != "sampling.cfg_scale":
        return DERIVED
    if value is ...:
        return REQUIRED
    return value if isinstance(value, str) else json.dumps(value)


def _type(schema: Mapping[str, Any]) -> str:
    if options := schema.get("anyOf", schema.get("oneOf")):
        return " or ".join(dict.fromkeys(_type(option) for option in options))
    if schema["type"] != "array":
        return TYPES[schema["type"]]
    if "prefixItems" in schema:
        return f"[{', '.join(_type(item) for item in schema['prefixItems'])}]"
    item = _type(schema["items"])
    return f"list of {item if item.startswith('[') else item + 's'}"


def _allowed(schema: Mapping[str, Any]) -> str:
    """Return the values of a choice, or the bounds of numbers (in a list: of each)."""
    values = _choices(schema)
    if values:
        return ", ".join(values)
    inner = [*schema.get("anyOf", schema.get("oneOf", [])), *schema.get("prefixItems", [])]
    if isinstance(schema.get("items"), dict):
        inner.append(schema["items"])
    bounds = [text.format(_number(schema[key])) for key, text in BOUNDS.items() if key in schema]
    if bounds:
        return ", ".join(bounds)
    return next((found for each in inner if (found := _allowed(each))), "")


def _number(value: float) -> str:
    return str(int(value) if value == int(value) else value)


def _choices(schema: Mapping[str, Any]) -> list[str]:
    if "const" in schema:
        return [schema["const"]]
    return [*schema.get("enum", []), *(value for option in schema.get("anyOf", []) for value in _choices(option))]


def _docstrings(config: type[BaseModel]) -> dict[str, str]:
    """Return the string literal after each field, of a class and those that it inherits from."""
    found: dict[str, str] = {}
    for parent in reversed(config.__mro__[: config.__mro__.index(BaseModel)]):
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(parent))).body
        assert isinstance(body, ast.ClassDef)  # noqa: S101  # it is the source of a class
        for field, after in zip(body.body, body.body[1:], strict=False):
            match field, after:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    found[name] = inspect.cleandoc(text)
    return found


def _first_sentence(text: str) -> str:
    paragraph = " ".join(text.split("\n\n")[0].split())
    sentence = re.split(r"(?<=\.) (?=[A-Z`])", paragraph)[0].removesuffix(".")
    return re.sub(rf"\b({'|'.join(WORDS)})\b", lambda match: WORDS[match[0]], sentence)
