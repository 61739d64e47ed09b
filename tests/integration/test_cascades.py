"""Cascades over HTTP: the bytes of both models run by hand with files between, events, errors, other interfaces."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import openai
import pytest
from PIL import Image

from service.engine.async_engine import EngineState
from service.errors import LoadConflict, LoadFailed, ModelError
from service.http.app import assemble
from service.http.kserve.routes import INPUTS
from service.http.start_up import start_up_facts
from service.settings import Settings
from tests.denoisers import ExactClassifier, ExactDenoiser
from tests.fakes import tiny_classifier_config, tiny_config
from tests.integration.exact_service import serving
from tests.integration.test_given_images import array_of, npy
from tests.waiting import PATIENCE_S, eventually, runs

SMALL = {"image_size": 4, "attention_resolutions": ()}
MODELS = {
    "base": ExactDenoiser(tiny_config(**SMALL)),
    "up": ExactDenoiser(tiny_config(low_res_size=4)),
}
CLASSES = [1, 2, 3]


def settings_of(*cascades: str, models: tuple[str, ...] = tuple(MODELS)) -> Settings:
    return Settings(models=tuple(map(Path, models)), cascades=cascades, max_rows=8)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with serving(assemble(settings_of("both=base+up"), dict(MODELS))) as address:
        yield address


def post(address: str, **body: Any) -> httpx.Response:
    fields = {"model": "both", "class": CLASSES, "seed": 7, "steps": 4, "format": "npy", "cfg_scale": 1.5} | body
    return httpx.post(f"http://{address}/v1/generate", json=fields, timeout=PATIENCE_S)


def arrays_of(answer: httpx.Response) -> npt.NDArray[Any]:
    assert answer.status_code == 200, answer.text
    return np.concatenate([array_of(image["b64_json"]) for image in answer.json()["images"]])


@pytest.mark.parametrize("seed", [7, 2**53 - 1])
def test_a_cascade_gives_the_bytes_of_both_models_run_by_hand(address: str, seed: int) -> None:
    answer = post(address, seed=seed, upsample={"steps": 3, "cfg_scale": 2.5, "sampler": "dpm++"})
    small = arrays_of(post(address, model="base", seed=seed))
    after = (seed + 1) % 2**53
    options = {"steps": 3, "cfg_scale": 2.5, "sampler": "dpm++", "seed": after}
    by_hand = post(address, model="up", cond=npy(small), **options)
    np.testing.assert_array_equal(arrays_of(answer), arrays_of(by_hand))
    assert arrays_of(answer).shape == (3, 8, 8, 1)
    image = answer.json()["images"][1]
    assert (image["seed"], image["steps"], image["class_index"], image["image_index"]) == (seed, 4, 2, 1)
    assert image["upsampled"] == {"model": "up", "steps": 3, "seed": after}
    assert by_hand.json()["images"][0]["upsampled"] is None


def test_by_default_the_upsampler_takes_25_steps_with_its_own_guidance(address: str) -> None:
    small = arrays_of(post(address, model="base"))
    by_hand = post(address, model="up", cond=npy(small), steps=25, seed=8, cfg_scale=None)
    np.testing.assert_array_equal(arrays_of(post(address)), arrays_of(by_hand))


@pytest.fixture(scope="module")
def guided() -> Iterator[str]:
    """Two cascades whose models have classifiers: of conditional and of unconditional networks."""
    models = {}
    for prefix, changes in (("", {}), ("free-", {"num_classes": None, "null_class": False})):
        small = ExactClassifier(tiny_classifier_config(image_size=4))
        models[f"{prefix}base"] = ExactDenoiser(tiny_config(**SMALL | changes), classifier=small)
        large = ExactClassifier(tiny_classifier_config())
        models[f"{prefix}up"] = ExactDenoiser(tiny_config(low_res_size=4, **changes), classifier=large)
    settings = settings_of("both=base+up", "free-both=free-base+free-up", models=tuple(models))
    with serving(assemble(settings, dict(models))) as address:
        yield address


@pytest.mark.parametrize(
    ("prefix", "scale", "upsampler_scale"),
    [("", 3.0, 0.0), ("", 0.0, 2.0), ("", 3.0, 2.0), ("free-", 3.0, 0.0), ("free-", 3.0, 2.0)],
    ids=["ADM-G", "ADM-U", "both", "unconditional ADM-G", "both unconditional"],
)
def test_guided_stages_give_the_bytes_of_both_guided_models_run_by_hand(
    guided: str, prefix: str, scale: float, upsampler_scale: float
) -> None:
    first = {"cfg_scale": 1, "classifier_scale": scale}
    later = {"steps": 3, "cfg_scale": 1, "classifier_scale": upsampler_scale}
    names = {"model": f"{prefix}both"}
    found = arrays_of(post(guided, upsample=later, **first, **names))
    small = arrays_of(post(guided, **first, model=f"{prefix}base"))
    # Without its classifier, an unconditional upsampler has no classes
    classes = {"class": None, "n": 3} if prefix and not upsampler_scale else {}
    by_hand = post(guided, **later, **classes, model=f"{prefix}up", cond=npy(small), seed=8)
    np.testing.assert_array_equal(found, arrays_of(by_hand))
    assert found.shape == (3, 8, 8, 1)
    other = {"classifier_scale": 1.5}
    for changed in (
        post(guided, upsample=later | other, **first, **names),
        post(guided, upsample=later, **first | other, **names),
    ):
        assert not np.array_equal(found, arrays_of(changed))


def test_one_image_of_a_cascade_equals_the_same_image_among_others(address: str) -> None:
    alone = post(address, **{"class": 2, "image_index": 1})
    np.testing.assert_array_equal(arrays_of(alone)[0], arrays_of(post(address))[1])


def test_the_base_begins_with_a_given_image(address: str) -> None:
    picture = np.arange(16, dtype=np.uint8).reshape(4, 4, 1) * 16
    body = {"image": npy(picture), "strength": 0.5, "class": 1}
    small = arrays_of(post(address, model="base", **body))
    by_hand = post(address, model="up", cond=npy(small), seed=8, steps=25, cfg_scale=None, **{"class": 1})
    mask = npy(np.zeros((4, 4), np.uint8))
    np.testing.assert_array_equal(arrays_of(post(address, **body)), arrays_of(by_hand))
    kept = post(address, image=npy(picture), mask=mask, dtype="float32", **{"class": 1})
    assert arrays_of(kept).shape == (1, 8, 8, 1)


def test_events_count_the_steps_of_both_stages_and_show_previews_of_both(address: str) -> None:
    body = {"model": "both", "class": 1, "seed": 7, "steps": 4, "stream": True, "preview_every": 1, "format": "npy"}
    sizes, steps = set(), []
    with httpx.stream("POST", f"http://{address}/v1/generate", json=body, timeout=PATIENCE_S) as answer:
        name = ""
        for line in answer.iter_lines():
            key, _, value = line.partition(": ")
            if key == "event":
                name = value
            elif key == "data" and name in ("progress", "preview", "completed"):
                data = json.loads(value)
                if name == "completed":
                    last = data
                else:
                    steps.append(data["step"])
                    assert data["steps"] == 29
                if name == "preview":
                    sizes.add(Image.open(io.BytesIO(base64.b64decode(data["b64_json"]))).size)
    assert sizes <= {(4, 4), (8, 8)}
    assert sizes
    assert steps == sorted(steps)
    assert array_of(last["images"][0]["b64_json"]).shape[-3:] == (8, 8, 1)


@pytest.mark.parametrize(
    ("body", "field", "rule"),
    [
        ({"model": "up", "upsample": {"steps": 5}}, "upsample", "is valid only for a cascade"),
        ({"upsample": {"steps": 1001}}, "upsample.steps", "must be 2..1000"),
        ({"upsample": {"steps": 1}}, "upsample.steps", ""),
        ({"upsample": {"seed": 1}}, "upsample.seed", ""),
        ({"upsample": {"classifier_scale": 1}}, "upsample.classifier_scale", "has no noisy classifier"),
        ({"cond": npy(np.zeros((4, 4, 1), np.uint8))}, "cond", "takes no conditioning image"),
        ({"class": [1] * 64, "steps": 1000}, "steps", "x (1000 x 2 + 25 x 2) = 131200"),
    ],
)
def test_an_error_names_the_field(address: str, body: dict[str, Any], field: str, rule: str) -> None:
    if body.get("model") == "up":
        body = body | {"cond": npy(np.zeros((4, 4, 1), np.uint8))}
    answer = post(address, **body)
    assert answer.status_code == 422, answer.text
    (error,) = answer.json()["errors"]
    assert (error["field"], rule in error["message"]) == (field, True), error


@pytest.mark.parametrize("path", ["v1/encode", "v1/denoise"])
def test_single_networks_are_called_by_their_own_names(address: str, path: str) -> None:
    array = npy(np.zeros((4, 4, 1), np.float32))
    body = {"model": "both", "image": array} if path == "v1/encode" else {"model": "both", "x_t": array, "timestep": 1}
    answer = httpx.post(f"http://{address}/{path}", json=body, timeout=PATIENCE_S)
    assert answer.status_code == 422
    assert '"both" is a cascade of "base" and "up"' in answer.json()["detail"]


def test_the_list_of_models_and_metrics_have_the_cascade(address: str) -> None:
    models = {m["name"]: m for m in httpx.get(f"http://{address}/v1/models", timeout=PATIENCE_S).json()["models"]}
    assert list(models) == ["base", "up", "both"]
    both = models["both"]
    assert (both["image_size"], both["cond"], both["classes"]) == (8, None, models["base"]["classes"])
    assert both["cascade"] == {"base": "base", "upsampler": "up", "given_size": 4, "upsampler_num_timesteps": 1000}
    assert both["numerics_id"] not in (models["base"]["numerics_id"], models["up"]["numerics_id"])
    arrays_of(post(address))
    metrics = httpx.get(f"http://{address}/metrics", timeout=PATIENCE_S).text
    assert 'iddpm_model_images_total{model="both",outcome="done"}' in metrics


def test_other_interfaces_serve_it(address: str) -> None:
    body = {"model": "both", "prompt": "Bee", "n": 1, "size": "8x8", "steps": 4, "seed": 7}
    answer = httpx.post(f"http://{address}/v1/images/generations", json=body, timeout=PATIENCE_S)
    assert answer.status_code == 200, answer.text
    (metadata,) = httpx.get(f"http://{address}/v2/models/both", timeout=PATIENCE_S).json()["outputs"][:1]
    assert metadata["shape"] == [-1, 8, 8, 1]
    inputs = [{"name": "steps", "datatype": "INT64", "shape": [1], "data": [4]}]
    inferred = httpx.post(f"http://{address}/v2/models/both/infer", json={"inputs": inputs}, timeout=PATIENCE_S)
    assert inferred.status_code == 200, inferred.text
    assert inferred.json()["outputs"][0]["shape"] == [1, 8, 8, 1]


UPSAMPLE = {"steps": 3, "cfg_scale": 2.5, "sampler": "dpm++"}


@pytest.mark.parametrize("path", ["generations", "edits"])
def test_openai_s_interface_takes_the_options_of_the_upsampler(address: str, path: str) -> None:
    fields = {"model": "both", "seed": 7, "steps": 4, "cfg_scale": 1.5}
    client = openai.OpenAI(base_url=f"http://{address}/v1", api_key="none", timeout=PATIENCE_S, max_retries=0)
    extra = fields | {"upsample": UPSAMPLE}
    if path == "edits":
        small = io.BytesIO()
        Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4) * 16).save(small, "PNG")
        answer = client.images.edit(image=small.getvalue(), prompt="Bee", extra_body=extra | {"strength": 0.5})
        given = {"image": base64.b64encode(small.getvalue()).decode(), "strength": 0.5}
    else:
        answer = client.images.generate(prompt="Bee", extra_body=extra)
        given = {}
    assert answer.data is not None
    [image] = answer.data
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(image.b64_json or ""))))
    native = arrays_of(post(address, **{"class": "Bee"}, upsample=UPSAMPLE, **given))
    np.testing.assert_array_equal(pixels, native[0, ..., 0])
    assert image.model_extra is not None
    assert image.model_extra["upsampled"] == {"model": "up", "steps": 3, "seed": 8}


def inferred(address: str, model: str, **inputs: Any) -> httpx.Response:
    tensors = [
        {"name": name, "datatype": INPUTS[name], "shape": [len(values)], "data": values}
        for name, values in inputs.items()
    ]
    url = f"http://{address}/v2/models/{model}/infer"
    return httpx.post(url, json={"inputs": tensors, "outputs": [{"name": "images"}]}, timeout=PATIENCE_S)


def test_kserve_s_interface_takes_the_options_of_the_upsampler(address: str) -> None:
    options = {f"upsample.{name}": [value] for name, value in UPSAMPLE.items()}
    asked = {"class_index": CLASSES, "seed": [7], "steps": [4], "cfg_scale": [1.5]}
    [images] = inferred(address, "both", **asked, **options).json()["outputs"]
    native = arrays_of(post(address, upsample=UPSAMPLE))
    assert images["data"] == native.ravel().tolist()
    assert images["data"] != arrays_of(post(address)).ravel().tolist()


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("both", {"upsample.steps": [1001]}, "upsample.steps: must be 2..1000"),
        ("both", {"upsample.steps": [2, 3]}, "upsample.steps: shape must be [1]; got [2]"),
        ("both", {"upsample.sampler": ["none"]}, 'upsample.sampler: must be "ancestral", '),
        ("base", {"upsample.steps": [3]}, "upsample: is valid only for a cascade"),
    ],
)
def test_kserve_s_errors_name_the_input_of_the_upsampler(
    address: str, model: str, options: dict[str, Any], message: str
) -> None:
    answer = inferred(address, model, **options)
    assert answer.status_code == 400
    assert message in answer.json()["error"]


def test_kserve_s_metadata_list_the_options_of_the_upsampler_for_cascades_only(address: str) -> None:
    wanted = {"upsample.steps": "INT64", "upsample.sampler": "BYTES"}
    wanted |= {"upsample.cfg_scale": "FP32", "upsample.classifier_scale": "FP32"}
    for model, expected in (("both", wanted), ("base", {}), ("up", {})):
        metadata = httpx.get(f"http://{address}/v2/models/{model}", timeout=PATIENCE_S).json()
        found = {tensor["name"]: tensor["datatype"] for tensor in metadata["inputs"] if "upsample" in tensor["name"]}
        assert found == expected


def test_statistics_of_a_cascade_count_the_calls_that_advanced_its_images(address: str) -> None:
    def stats() -> dict[str, Any]:
        listed = httpx.get(f"http://{address}/v2/models/stats", timeout=PATIENCE_S).json()["model_stats"]
        return {model["name"]: model for model in listed}

    def calls(of: dict[str, Any]) -> dict[str, int]:
        for model in of.values():
            assert sum(batch["compute_infer"]["count"] for batch in model["batch_stats"]) == model["execution_count"]
        return {name: model["execution_count"] for name, model in of.items()}

    before = stats()
    arrays_of(post(address, upsample={"steps": 3}, **{"class": 1}))
    cascade = stats()
    arrays_of(post(address, model="base", **{"class": 1}))
    found = {name: count - calls(before)[name] for name, count in calls(cascade).items()}
    assert found == {"base": 4, "up": 3, "both": 7}
    assert {name: count - calls(cascade)[name] for name, count in calls(stats()).items()} == {
        "base": 4,
        "up": 0,
        "both": 0,
    }
    assert cascade["both"]["inference_count"] - before["both"]["inference_count"] == 1


@runs
async def test_start_up_describes_a_cascade_by_the_size_of_its_results() -> None:
    app = assemble(settings_of("both=base+up"), dict(MODELS))
    async with app.router.lifespan_context(app):
        facts = start_up_facts(app.state.service, [], 1)
    shapes = {model["name"]: model["image_shape"] for model in facts["models"]}
    assert shapes == {"base": [1, 4, 4], "up": [1, 8, 8], "both": [1, 8, 8]}


@pytest.mark.parametrize(
    ("cascade", "changes", "reason"),
    [
        ("both=up+base", {}, '"base" is not an upsampler'),
        ("both=base+up", {"image_size": 8}, '"up" takes images of 4 x 4 pixels of 1 channel, "base" makes images of 8'),
        ("both=base+up", {"num_classes": 2}, '"up" has other classes than "base"'),
        ("both=base+up", {"cond_channels": 1}, 'the base "base" needs a conditioning image itself'),
    ],
)
def test_models_that_do_not_fit_together_end_start_up(cascade: str, changes: dict[str, Any], reason: str) -> None:
    models = {**MODELS, "base": ExactDenoiser(tiny_config(**SMALL | changes))}
    with pytest.raises(ModelError, match=reason):
        assemble(settings_of(cascade), models)


@pytest.mark.parametrize(
    ("cascades", "rule"),
    [
        (("both=base",), "NAME=BASE\\+UPSAMPLER"),
        (("both=base+up+up",), "NAME=BASE\\+UPSAMPLER"),
        (("=base+up",), "NAME=BASE\\+UPSAMPLER"),
        (("both=base+other",), "no model is named 'other'; the models are base, up"),
        (("up=base+up",), "'up' is the name of another model or cascade"),
        (("a=base+up", "a=base+up"), "'a' is the name of another model or cascade"),
    ],
)
def test_settings_are_checked(cascades: tuple[str, ...], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        settings_of(*cascades)


def test_float_data_is_not_rounded_between_the_stages() -> None:
    ranges = {"value_range": (-50.0, 950.0)}
    models = {name: ExactDenoiser(denoiser.config.replace(**ranges)) for name, denoiser in MODELS.items()}
    with serving(assemble(settings_of("both=base+up"), dict(models))) as address:
        options = {"steps": 3, "cfg_scale": 1, "dtype": "float32"}
        small = arrays_of(post(address, model="base", dtype="float32"))
        assert not np.array_equal(small, np.rint(small))
        by_hand = post(address, model="up", cond=npy(small), seed=8, **options)
        answer = post(address, dtype="float32", upsample={"steps": 3, "cfg_scale": 1})
        np.testing.assert_array_equal(arrays_of(answer), arrays_of(by_hand))


@runs
async def test_a_reloaded_model_is_reloaded_in_its_cascade_and_stays_in_it(tmp_path: Path) -> None:
    for name in ("base", "up", "both"):
        (tmp_path / name).mkdir()
    loaded: list[ExactDenoiser] = []
    settings = settings_of("both=base+up").model_copy(update={"admin_root": tmp_path})
    app = assemble(settings, dict(MODELS), lambda _: loaded[-1])
    async with app.router.lifespan_context(app):
        state = app.state.service
        await eventually(lambda: state.engine.state is EngineState.READY)
        before = state.models["both"]
        loaded.append(ExactDenoiser(tiny_config(**SMALL)))
        loaded[-1].network_id = "new weights"
        await state.registry.load("base")
        both = state.models["both"]
        assert both.stages == (state.models["base"], state.models["up"])
        assert both.engine_id == state.models["base"].engine_id != before.engine_id
        assert both.numerics_id != before.numerics_id
        loaded.append(ExactDenoiser(tiny_config()))
        with pytest.raises(LoadFailed, match='"base" makes images of 8 x 8'):
            await state.registry.load("base")
        assert state.models["both"] is both
        with pytest.raises(LoadConflict, match="both is the name of a cascade"):
            await state.registry.load("both")
        for name in ("base", "up", "both"):
            with pytest.raises(LoadConflict, match="belongs to the cascade both"):
                state.registry.unload(name)
