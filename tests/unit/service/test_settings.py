"""The settings of the service: values, defaults, refusals and documentation."""

from __future__ import annotations

import ast
import inspect
import textwrap
from ipaddress import ip_network
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from formats.checkpoint_config import describe_validation_error
from service.backends.base import BackendOptions
from service.engine.config import EngineConfig
from service.settings import Settings, refuse_unknown_variables
from tests.paths import ROOT

MODELS = (Path("m"),)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_needs_no_keys(host: str) -> None:
    assert Settings(models=MODELS, host=host).keys_file is None


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "images.example", ""])  # noqa: S104  # refused
def test_listening_to_other_machines_needs_keys_or_an_explicit_setting(host: str) -> None:
    with pytest.raises(ValidationError, match="is reachable from other machines, and no key is required"):
        Settings(models=MODELS, host=host)
    assert Settings(models=MODELS, host=host, keys_file=Path("keys.json")).host == host
    assert Settings(models=MODELS, host=host, allow_keyless=True).host == host


def test_a_host_may_have_the_brackets_of_a_url() -> None:
    assert Settings(models=MODELS, host="[::1]").host == "::1"


def test_administration_from_other_machines_needs_keys() -> None:
    root = Path("models")
    assert Settings(models=MODELS, admin_root=root).admin_root == root
    assert Settings(models=MODELS, admin_root=root, host="192.0.2.1", keys_file=Path("keys.json")).admin_root == root
    with pytest.raises(ValidationError, match="could load and unload models"):
        Settings(models=MODELS, admin_root=root, host="192.0.2.1", allow_keyless=True)


def test_unknown_variables_are_refused_except_those_of_the_client(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_variables_that_kubernetes_sets_for_a_service_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SERVICE_LINKS.items():
        monkeypatch.setenv(name, value)
    refuse_unknown_variables()
    assert Settings(models=MODELS).port == 8000
    monkeypatch.setenv("IDDPM_PORT", "9000")
    assert Settings(models=MODELS).port == 9000
    monkeypatch.setenv("IDDPM_METRICS_PORT", "9100")
    with pytest.raises(ValueError, match="unknown environment variable IDDPM_METRICS_PORT; settings are"):
        refuse_unknown_variables()


def test_the_error_for_a_missing_model_has_the_flag_and_the_variable() -> None:
    with pytest.raises(ValidationError, match=r"name a model folder: --model FOLDER, or IDDPM_MODELS"):
        Settings()


def variable(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> Settings:
    """Return the settings with one variable set."""
    monkeypatch.setenv(f"IDDPM_{name.upper()}", value)
    return Settings(models=MODELS)


@pytest.mark.parametrize(
    ("name", "value", "read"),
    [
        (
            "allowed_hosts",
            " ::1, Images.Example. ,bücher.example",
            ("[::1]", "images.example", "xn--bcher-kva.example"),
        ),
        ("allowed_hosts", "*", ("*",)),
        ("trusted_proxies", "10.0.0.0/8, [fd00::1]", (ip_network("10.0.0.0/8"), ip_network("fd00::1/128"))),
        ("trusted_proxies", "", ()),
        ("backend", "openvino \r", "openvino"),
        ("device", " cpu", "cpu"),
        ("host", "127.0.0.1\n", "127.0.0.1"),
        ("max_rows", " 4\r\n", 4),
        ("keys_file", " keys.json ", Path("keys.json")),
        ("traces", "true ", True),
        ("cache_dir", "", ""),
        ("engines_dir", "", ""),
    ],
)
def test_values_are_normalised_and_stripped(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, read: object
) -> None:
    assert getattr(variable(monkeypatch, name, value), name) == read


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "allowed_hosts",
            "localhost:9101,*.example.com",
            "allowed_hosts.0: 'localhost:9101' must be a host without scheme, ",
        ),
        ("allowed_hosts", " , ", "allowed_hosts: is empty: list the names and addresses that clients use"),
        ("trusted_proxies", "*", "trusted_proxies.0: '*' is not a network: list the addresses of the proxies"),
        ("trusted_proxies", "10.0.0.5/8", "trusted_proxies.0: '10.0.0.5/8' has host bits set: write 10.0"),
        ("trusted_proxies", "10.0.0.1,proxy", "trusted_proxies.1: 'proxy' is neither an IP address nor a network"),
        ("port", "", "port: is empty: give a value, or remove the variable IDDPM_PORT"),
        ("max_rows", "  ", "max_rows: is empty: give a value, or remove the variable IDDPM_MAX_ROWS"),
        ("client_share", "", "client_share: is empty: give a value, or remove the variable IDDPM_CLIENT_SHARE"),
        ("traces", "", "traces: is empty: give a value, or remove the variable IDDPM_TRACES"),
        ("keys_file", "", "keys_file: is empty: give a value, or remove the variable IDDPM_KEYS_FILE"),
        ("admin_root", " ", "admin_root: is empty: give a value, or remove the variable IDDPM_ADMIN_ROOT"),
    ],
)
def test_values_that_cannot_have_an_effect_are_refused_with_one_line(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    with pytest.raises(ValidationError) as raised:
        variable(monkeypatch, name, value)
    described = describe_validation_error(raised.value)
    assert described.startswith(message)
    assert "\n" not in described


def test_models_are_named_after_their_folder_or_explicitly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lr=1e-4").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("IDDPM_MODELS", "a=runs/a/model, b.2=runs/b=3/model,lr=1e-4,runs/lr=2/model,other")
    assert Settings().model_folders == {
        "a": Path("runs/a/model"),
        "b.2": Path("runs/b=3/model"),
        "lr=1e-4": Path("lr=1e-4"),
        "model": Path("runs/lr=2/model"),
        "other": Path("other"),
    }


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (
            "runs/a/model,runs/b/model",
            "would all be 'model': give them names, as in --model NAME=runs/a/model",
        ),
        ("x=a,x=b", "a, b would all be 'x'"),
        ("my model=a", "begin with a letter or digit; got 'my model'"),
        (".hidden=a", "got '.hidden'"),
        ("=a", "got ''"),
        ("a=", "the folder is missing; got 'a='"),
        ("/", "/ has no name of its own: give it one, NAME=/"),
    ],
)
def test_names_of_models_are_checked(models: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IDDPM_MODELS", models)
    with pytest.raises(ValidationError) as caught:
        Settings()
    assert message in str(caught.value)


def allowed(schema: dict[str, Any]) -> str:
    """Return the allowed values of a setting, from its JSON schema."""
    schema = next((choice for choice in schema.get("anyOf", []) if choice.get("type") != "null"), schema)
    if schema.get("type") == "boolean":
        return "true, false"
    if "enum" in schema:
        return ", ".join(schema["enum"])
    low, above = schema.get("minimum"), schema.get("exclusiveMinimum")
    lowest = f"above {above}" if above is not None else f"{low}" if low is not None else ""
    return f"{lowest}..{schema['maximum']}" if "maximum" in schema else f"{lowest}.." if low is not None else lowest


def default(value: object) -> str:
    """Return a setting's default as its environment variable would be written."""
    if isinstance(value, tuple):
        value = ",".join(map(str, value))
    if isinstance(value, bool):
        value = str(value).lower()
    return "" if value in (None, "") else f"`{value}`"


def meanings() -> dict[str, str]:
    """Return the docstring of each setting, in one line; those of the engine and the backends are in their classes."""
    return documented(BackendOptions) | documented(EngineConfig) | documented(Settings)


def documented(owner: type) -> dict[str, str]:
    """Return the docstring of each field of a class, in one line."""
    (settings,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
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


def test_settings_of_the_engine_and_the_backends_reach_them() -> None:
    changed: dict[str, Any] = {"max_rows": 4, "max_queue": 7, "max_wait_s": 5.0, "policy": "fifo", "client_share": 0.5}
    config = Settings(models=MODELS, strict_graphs=True, **changed).engine_config()
    assert config == EngineConfig(strict_graphs=True, **changed)
    run: dict[str, Any] = {
        "threads": 3,
        "device": "cpu",
        "precision": "fp32",
        "torch_compile": True,
        "fuse_update": False,
        "cache_dir": "c",
        "engines_dir": "e",
    }
    options = Settings(models=MODELS, max_rows=4, build_engines=True, **run).backend_options()
    assert options == BackendOptions(max_rows=4, **run)


def test_the_documentation_of_settings_matches_them() -> None:
    properties, said = Settings.model_json_schema()["properties"], meanings()
    rows = [
        f"| `IDDPM_{name.upper()}` | {default(field.default)} | {allowed(properties[name])} | {said[name]} |"
        for name, field in Settings.model_fields.items()
    ]
    page = (ROOT / "docs" / "settings.md").read_text()
    assert [line for line in page.splitlines() if line.startswith("| `IDDPM_")] == rows
