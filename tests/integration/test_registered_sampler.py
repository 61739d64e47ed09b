"""A sampler is a function and a line in the registry: every interface then offers it without any other change."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import numpy.typing as npt
import pytest
import tritonclient.http as triton
from PIL import Image
from typer.testing import CliRunner

from cli.main import app as commands
from diffusion.config import DiffusionConfig
from diffusion.plans import PLAN_COLUMNS, SAMPLERS, Sampler, SamplingPlan, ancestral_plan
from tests.integration.exact_service import MODEL, exact_app, expected, serving
from tests.waiting import PATIENCE_S


def toy_plan(diffusion: DiffusionConfig, spec: str, clip: bool = True) -> SamplingPlan:
    """Ancestral sampling with half of its noise."""
    plan = ancestral_plan(diffusion, spec, clip)
    table = plan.table.copy()
    table[:, PLAN_COLUMNS.index("noise_scale")] /= 2
    return replace(plan, table=table)


# Plans are cached by name in a process: no other test may give this name to another sampler.
@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch, serving(exact_app()) as address:
        patch.setitem(SAMPLERS, "half-noise", Sampler(plan=toy_plan, recommended_steps=(3, 30)))
        yield address


def toy_pixels(index: int = 0) -> npt.NDArray[np.uint8]:
    pixels = expected(7, index, 1, steps=5, sampler="half-noise")
    assert not np.array_equal(pixels, expected(7, index, 1, steps=5))
    return pixels


@pytest.mark.parametrize(
    ("path", "body"),
    [("v1/generate", {"class": 1, "n": 2}), ("v1/images/generations", {"prompt": "1", "n": 2})],
)
def test_it_samples_over_json(address: str, path: str, body: dict[str, object]) -> None:
    fields = {"steps": 5, "seed": 7, "sampler": "half-noise"}
    answer = httpx.post(f"http://{address}/{path}", json=body | fields, timeout=PATIENCE_S)
    assert answer.status_code == 200, answer.text
    for index, image in enumerate(answer.json().get("images") or answer.json()["data"]):
        png = Image.open(io.BytesIO(base64.b64decode(image["b64_json"])))
        assert np.array_equal(np.asarray(png), toy_pixels(index)[:, :, 0])


@pytest.mark.parametrize("sampler", ["dpm++", "sde-dpm++"])
def test_a_multistep_sampler_samples_over_json(address: str, sampler: str) -> None:
    body = {"class": 1, "steps": 5, "seed": 7, "sampler": sampler}
    answer = httpx.post(f"http://{address}/v1/generate", json=body, timeout=PATIENCE_S)
    assert answer.status_code == 200, answer.text
    png = Image.open(io.BytesIO(base64.b64decode(answer.json()["images"][0]["b64_json"])))
    assert np.array_equal(np.asarray(png), expected(7, 0, 1, steps=5, sampler=sampler)[:, :, 0])


def test_it_samples_over_kserve(address: str) -> None:
    def tensor(name: str, datatype: str, value: object, kind: type) -> triton.InferInput:
        return triton.InferInput(name, [1], datatype).set_data_from_numpy(np.array([value], dtype=kind))

    inputs = [
        tensor("sampler", "BYTES", "half-noise", object),
        tensor("class_index", "INT64", 1, np.int64),
        tensor("steps", "INT64", 5, np.int64),
        tensor("seed", "INT64", 7, np.int64),
    ]
    with triton.InferenceServerClient(address) as client:
        answer = client.infer(MODEL, inputs)
    assert np.array_equal(answer.as_numpy("images")[0], toy_pixels())


def test_the_lists_of_all_interfaces_have_it(address: str) -> None:
    info = {"name": "half-noise", "options": [], "recommended_steps": [3, 30]}
    listed = httpx.get(f"http://{address}/v1/models", timeout=PATIENCE_S).json()["samplers"]
    assert listed[-1] == info
    assert httpx.get(f"http://{address}/v2/models/{MODEL}", timeout=PATIENCE_S).json()["samplers"] == listed
    config = httpx.get(f"http://{address}/v2/models/{MODEL}/config", timeout=PATIENCE_S).json()
    assert json.loads(config["parameters"]["samplers"]["string_value"]) == listed


def test_the_command_line_takes_it(address: str, tmp_path: Path) -> None:
    def run(*arguments: object) -> tuple[int, str]:
        common = ["sample", "--url", f"http://{address}", "--class", "1", "--steps", "5", "--seed", "7"]
        result = CliRunner().invoke(commands, [*common, *map(str, arguments)])
        return result.exit_code, " ".join(result.output.split())

    code, output = run("--sampler", "half-noise", "-o", tmp_path / "toy.npy")
    assert code == 0, output
    assert np.array_equal(np.load(tmp_path / "toy.npy")[0], toy_pixels())
    code, output = run("--sampler", "euler", "-o", tmp_path / "no.npy")
    assert (code, '"sde-dpm++" or "half-noise"; got "euler"' in output) == (1, True)


def test_the_document_and_the_messages_name_it(address: str) -> None:
    document = httpx.get(f"http://{address}/openapi.json", timeout=PATIENCE_S).json()
    sampler = document["components"]["schemas"]["GenerateRequest"]["properties"]["sampler"]
    assert sampler["anyOf"][0]["enum"] == ["ancestral", "ddim", "dpm++", "sde-dpm++", "half-noise"]
    refused = httpx.post(f"http://{address}/v1/generate", json={"sampler": "euler"}, timeout=PATIENCE_S)
    assert 'must be "ancestral", "ddim", "dpm++", "sde-dpm++" or "half-noise"; got "euler"' in refused.json()["detail"]
    refused = httpx.post(
        f"http://{address}/v1/generate", json={"sampler": "half-noise", "eta": 0.5}, timeout=PATIENCE_S
    )
    assert 'is valid only with sampler "ddim"; sampler is "half-noise"' in refused.json()["detail"]
