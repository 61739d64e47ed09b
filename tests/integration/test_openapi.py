"""The OpenAPI document is complete enough to generate tests from, and its examples work; so do those of docs/."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator

from diffusion.config import CheckpointConfig
from formats.checkpoint_config import read_config
from tests.counts import LONG
from tests.denoisers import ExactDenoiser
from tests.integration.exact_service import exact_app, serving
from tests.paths import ROOT
from tests.waiting import PATIENCE_S

BUNDLED = ROOT / "models" / "fashion32"
PAGE = ROOT / "docs" / "http.md"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A service with the settings of `make serve`."""
    config = read_config(BUNDLED)
    assert isinstance(config, CheckpointConfig)
    with serving(exact_app(ExactDenoiser(config), name=BUNDLED.name)) as address:
        yield address


def test_schemathesis_finds_nothing(tmp_path: Path) -> None:
    """Run all its checks: no 5xx, no undocumented answer, no invalid input accepted, no valid input refused."""
    short = ("--phases", "examples,coverage", "--include-path", "/v1/generate", "--seed", "1")  # all paths: a minute
    long = ("--max-examples", "500")
    with serving(exact_app(max_row_steps=200)) as address:  # few rows and steps in any request
        command = [
            str(Path(sys.executable).with_name("schemathesis")),
            *("--config-file", str(ROOT / "schemathesis.toml")),
            *(
                "run",
                f"http://{address}/openapi.json",
                "--checks",
                "all",
                "--generation-database",
                "none",
                "--no-color",
            ),
            *(long if LONG else short),
        ]
        run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_S)
    assert run.returncode == 0, run.stdout + run.stderr


def test_the_document_is_valid_for_the_version_that_it_declares(tmp_path: Path) -> None:
    document = exact_app(admin_root=tmp_path).openapi()
    assert document["openapi"].startswith("3.1.")
    assert "/v1/admin/models/{name}/load" in document["paths"]
    OpenAPIV31SpecValidator(document).validate()


def test_a_post_of_any_body_gets_the_status_of_its_path(address: str) -> None:
    for path, status in (("/healthz", 405), ("/v1/models", 405), ("/nowhere", 404), ("/v1/generate", 415)):
        assert httpx.post(f"http://{address}{path}", content=b"x", timeout=PATIENCE_S).status_code == status


def test_examples_of_the_document_work(address: str) -> None:
    document = httpx.get(f"http://{address}/openapi.json", timeout=PATIENCE_S).json()
    posted = 0
    for path, operations in document["paths"].items():
        body = operations.get("post", {}).get("requestBody")
        if body is None or "application/json" not in body["content"]:
            continue  # a form has no example
        described = body["content"]["application/json"]
        schema = described["schema"]
        if "$ref" in schema:
            schema = document["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]]
        examples = [described["example"]] if "example" in described else schema["examples"]
        for example in examples:
            answer = httpx.post(_url(address, path), json=example, timeout=PATIENCE_S)
            assert answer.status_code == 200, answer.text
            posted += 1
    assert posted == 6


def _url(address: str, path: str) -> str:
    (model,) = httpx.get(f"http://{address}/v1/models", timeout=PATIENCE_S).json()["models"]
    return f"http://{address}{path.format(model=model['name'], version=model['numerics_id'])}"


def examples(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)


def run_example(code: str, address: str) -> dict[str, Any]:
    """Run an example of the page; return its names."""
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile(code.replace("127.0.0.1:8000", address), PAGE.name, "exec"), names)  # noqa: S102  # our own page
    names["client"].close()  # the examples need not call it
    return names


@pytest.mark.parametrize("code", examples("python"), ids=range(7))
def test_python_examples_of_the_page_work(address: str, code: str, capsys: pytest.CaptureFixture[str]) -> None:
    run_example(code, address)
    assert capsys.readouterr().out


def test_the_client_with_its_own_loop_gets_the_service_s_pixels(
    address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = [code for code in examples("python") if "/v1/denoise" in code]
    names = run_example(code, address)
    assert capsys.readouterr().out == "0\n"
    own, theirs = names["own"], names["theirs"]
    assert (own.shape, own.dtype, len(np.unique(own)) > 10) == (theirs.shape, np.uint8, True)  # not one colour
    np.testing.assert_array_equal(own, theirs)


@pytest.mark.parametrize("code", examples("sh"), ids=range(2))
def test_curl_examples_of_the_page_work(address: str, code: str) -> None:
    url, headers, body = _curl(code)
    answer = httpx.post(url.replace("127.0.0.1:8000", address), content=body, headers=headers, timeout=PATIENCE_S)
    assert answer.status_code == 200, answer.text


def _curl(command: str) -> tuple[str, dict[str, str], str]:
    """Parse the request that a curl command sends."""
    found = re.search(r"curl -s (\S+) -H '(\S+): (\S+)' \\\n +-d '(.*)'", command)
    assert found is not None, command
    url, name, value, body = found.groups()
    return url, {name: value}, body
