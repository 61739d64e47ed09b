"""The parity report for graphs with known errors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from diffusion.time_mlp import WEIGHTS, TimeMLP
from formats.artifact import NetworkParity
from interchange.published import PUBLISHED
from model_export import parity
from model_export.parity import Reference, chain_parity, network_parity, unet_reference
from model_export.runtimes import Arrays, Graph, Runtime
from tests.fakes import tiny_config, tiny_network

CONFIG = tiny_config()


def runtime(graph: Graph) -> Runtime:
    return Runtime("made up 1.0", "fp32", lambda _: graph)


@pytest.fixture(scope="module")
def reference() -> Reference:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(parity, "STEPS", 6)
        return unet_reference(tiny_network(CONFIG), CONFIG, time_mlp())


def time_mlp() -> TimeMLP:
    weights = tiny_network(CONFIG).state_dict()
    return TimeMLP({name: weights[name].numpy() for name in WEIGHTS})


class Replay:
    """A graph that gives the reference's outputs, each half multiplied by its own factor from some timestep on."""

    def __init__(self, reference: Reference, prediction: float, variance: float, from_t: float = 0.0) -> None:
        self._calls = iter(reference.calls)
        self._factors = np.array([1 + prediction, 1 + variance], np.float32).reshape(1, 2, 1, 1)
        self._from_t = from_t

    def __call__(self, inputs: Arrays) -> npt.NDArray[np.float32]:
        call = next(self._calls)
        np.testing.assert_allclose(inputs["x_t"], call.inputs["x_t"], atol=1e-5)  # numpy's noise equals torch's
        return call.expected * (self._factors if call.t >= self._from_t else np.float32(1))


def test_errors_are_relative_and_reported_by_half_and_band(reference: Reference) -> None:
    graph = Replay(reference, prediction=1e-3, variance=-0.25, from_t=500)
    found = network_parity(graph, reference.calls, CONFIG, runtime(graph), "model.onnx")
    assert [(band.t_min, band.t_max) for band in found.bands] == [(200 * k, 200 * k + 199) for k in range(5)]
    assert [band.prediction for band in found.bands][:2] == [0.0, 0.0]
    assert [band.variance for band in found.bands][:2] == [0.0, 0.0]
    for band in found.bands[3:]:
        assert band.prediction == pytest.approx(1e-3, rel=1e-3)
        assert band.variance == pytest.approx(0.25, rel=1e-3)
    assert not found.passed


def test_an_exact_graph_passes(reference: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "STEPS", 6)
    graph = Replay(reference, 0.0, 0.0)
    assert network_parity(graph, reference.calls, CONFIG, runtime(graph), "model.onnx").worst == 0.0
    chain = chain_parity(Replay(reference, 0.0, 0.0), reference, time_mlp(), runtime(graph))
    assert (chain.beyond_1, chain.passed) == (0.0, True)


def test_an_overflow_is_a_finite_error_beyond_every_limit(reference: Reference) -> None:
    graph = Replay(reference, np.nan, 0.0)
    found = network_parity(graph, reference.calls, CONFIG, runtime(graph), "model.onnx")
    assert not found.passed
    assert found.worst == found.bands[0].prediction == parity.NO_NUMBER
    assert NetworkParity.model_validate_json(json.dumps(found.model_dump(mode="json"), allow_nan=False)) == found


def test_pixels_are_counted_by_their_error(reference: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "STEPS", 6)
    replay = Replay(reference, 0.0, 0.0)
    pixels = parity.sample_chain(CONFIG, reference.size, lambda x_t, t: replay({"x_t": x_t}), np).astype(int)
    off = np.zeros_like(pixels)
    off.ravel()[:4] = [1, 2, 3, 5]
    elsewhere = replace(reference, pixels=np.where(pixels > 127, pixels - off, pixels + off).astype(np.uint8))
    graph = Replay(reference, 0.0, 0.0)
    chain = chain_parity(graph, elsewhere, time_mlp(), runtime(graph))
    assert (chain.beyond_1, chain.beyond_2, chain.beyond_4) == (3 / off.size, 2 / off.size, 1 / off.size)
    assert chain.passed == (2 / off.size <= parity.PIXEL_LIMIT)


def test_errors_name_the_file_and_the_runtime(reference: Reference) -> None:
    graph = Replay(reference, 0.0, 0.0)
    found = network_parity(graph, reference.calls, CONFIG, Runtime("x 2", "bf16", lambda _: graph), Path("g").name)
    assert (found.backend, found.precision, found.file, found.limit) == ("x 2", "bf16", "g", parity.LIMITS["bf16"])


def test_large_networks_are_measured_with_fewer_images_and_then_fewer_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    flops = parity.flops_of_call(CONFIG.model)

    def size(calls: float) -> tuple[int, int]:
        monkeypatch.setattr(parity, "CHAIN_FLOPS", calls * flops)
        chosen = parity.chain_size(CONFIG.model, CONFIG.diffusion)
        return chosen.steps, chosen.images

    assert [size(calls) for calls in (1e4, 200, 199, 99, 20, 3)] == [
        (50, 4),
        (50, 4),
        (50, 3),
        (50, 1),
        (20, 1),
        (10, 1),
    ]


@pytest.mark.parametrize(
    ("preset", "expected"),
    [("cifar10-uncond-50m", (50, 4)), ("adm-imagenet64", (50, 1)), ("adm-upsampler-64-256", (15, 1))],
)
def test_export_of_the_published_networks_takes_a_limited_number_of_calls(
    preset: str, expected: tuple[int, int]
) -> None:
    config = PUBLISHED[preset].config
    chosen = parity.chain_size(config.model, config.diffusion)
    assert (chosen.steps, chosen.images) == expected
