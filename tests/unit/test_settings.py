"""What an operator may set."""

from __future__ import annotations

import ast
import inspect
import textwrap
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from service.settings import Settings, refuse_unknown_variables

MODELS = (Path("m"),)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_needs_no_keys(host: str) -> None:
    assert Settings(models=MODELS, host=host).keys_file is None


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "images.example", ""])  # noqa: S104  # refused
def test_listening_for_others_needs_keys_or_the_word_that_none_are_wanted(host: str) -> None:
    with pytest.raises(ValidationError, match="can be reached by others, who would need no key"):
        Settings(models=MODELS, host=host)
    assert Settings(models=MODELS, host=host, keys_file=Path("keys.json")).host == host
    assert Settings(models=MODELS, host=host, allow_keyless=True).host == host


def test_models_can_be_changed_by_others_only_with_keys() -> None:
    root = Path("models")
    assert Settings(models=MODELS, admin_root=root).admin_root == root
    assert Settings(models=MODELS, admin_root=root, host="192.0.2.1", keys_file=Path("keys.json")).admin_root == root
    with pytest.raises(ValidationError, match="could load and unload models"):
        Settings(models=MODELS, admin_root=root, host="192.0.2.1", allow_keyless=True)


def test_misspelt_variables_are_refused_and_those_of_the_client_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IDDPM_KEY", "iddpm_x")
    refuse_unknown_variables()
    monkeypatch.setenv("IDDPM_KEYS", "iddpm_x")
    with pytest.raises(ValueError, match=r"unknown environment variable IDDPM_KEYS; settings are .*IDDPM_KEYS_FILE"):
        refuse_unknown_variables()


SERVICE_LINKS = {
    "IDDPM_SERVICE_HOST": "10.0.0.7",
    "IDDPM_SERVICE_PORT": "8000",
    "IDDPM_SERVICE_PORT_HTTP": "8000",
    "IDDPM_PORT": "tcp://10.0.0.7:8000",
    "IDDPM_PORT_8000_TCP": "tcp://10.0.0.7:8000",
    "IDDPM_PORT_8000_TCP_PROTO": "tcp",
    "IDDPM_API_SERVICE_HOST": "10.0.0.8",
    "IDDPM_API_PORT": "tcp://10.0.0.8:8000",
}


def test_what_kubernetes_says_of_a_service_of_our_name_is_no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SERVICE_LINKS.items():
        monkeypatch.setenv(name, value)
    refuse_unknown_variables()
    assert Settings(models=MODELS).port == 8000
    monkeypatch.setenv("IDDPM_PORT", "9000")
    assert Settings(models=MODELS).port == 9000
    monkeypatch.setenv("IDDPM_METRICS_PORT", "9100")
    with pytest.raises(ValueError, match="unknown environment variable IDDPM_METRICS_PORT; settings are"):
        refuse_unknown_variables()


def test_without_a_model_it_says_how_to_name_one() -> None:
    with pytest.raises(ValidationError, match=r"name a model folder: --model FOLDER, or IDDPM_MODELS"):
        Settings()


def allowed(schema: dict[str, Any]) -> str:
    """Say what a setting may be, by its JSON schema."""
    schema = next((choice for choice in schema.get("anyOf", []) if choice.get("type") != "null"), schema)
    if schema.get("type") == "boolean":
        return "true, false"
    if "enum" in schema:
        return ", ".join(schema["enum"])
    low, above = schema.get("minimum"), schema.get("exclusiveMinimum")
    lowest = f"above {above}" if above is not None else f"{low}" if low is not None else ""
    return f"{lowest}..{schema['maximum']}" if "maximum" in schema else f"{lowest}.." if low is not None else lowest


def default(value: object) -> str:
    """Write a setting's default as its environment variable would be."""
    if isinstance(value, tuple):
        value = ",".join(map(str, value))
    if isinstance(value, bool):
        value = str(value).lower()
    return "" if value in (None, "") else f"`{value}`"


def meanings() -> dict[str, str]:
    """Return the docstring of each setting, in one line."""
    (settings,) = ast.parse(textwrap.dedent(inspect.getsource(Settings))).body
    assert isinstance(settings, ast.ClassDef)
    return {
        field.target.id: " ".join(said.value.value.split())
        for field, said in pairwise(settings.body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(said, ast.Expr)
        and isinstance(said.value, ast.Constant)
        and isinstance(said.value.value, str)
    }


def test_the_page_on_settings_says_what_they_are() -> None:
    properties, said = Settings.model_json_schema()["properties"], meanings()
    rows = [
        f"| `IDDPM_{name.upper()}` | {default(field.default)} | {allowed(properties[name])} | {said[name]} |"
        for name, field in Settings.model_fields.items()
    ]
    page = (Path(__file__).parents[2] / "docs" / "settings.md").read_text()
    assert [line for line in page.splitlines() if line.startswith("| `IDDPM_")] == rows
