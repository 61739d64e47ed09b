"""Models are loaded, reloaded and unloaded by name while the service answers requests."""

from __future__ import annotations

import asyncio
import gc
import inspect
import io
import re
import shutil
import threading
import weakref
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import pytest
from fastapi.routing import iter_route_contexts

from diffusion.network_inputs import NetworkInputs
from diffusion.plans import build_plan
from diffusion.sampling import ImageSpec, sample_images
from service.backends.base import Denoiser
from service.errors import ModelError
from service.http import execution
from service.http.app import assemble, create_app
from service.http.door.keys import ApiKey, Limits, hash_of, new_key
from service.http.door.keys_file import write_keys
from service.http.kserve.routes import check_version
from service.http.native.admin import registry_for_admins
from service.http.state import service_state
from service.requests.given import read_given
from service.settings import Settings
from tests.denoisers import AsNetwork, ExactDenoiser
from tests.fakes import tiny_config
from tests.integration.in_process import PausedDenoiser, Service
from tests.integration.test_given_images import npy
from tests.paths import BUNDLED
from tests.waiting import PATIENCE_S, eventually, runs

NPZ = {"Accept": "application/x-npz"}


class Halved(ExactDenoiser):
    """A network with other weights."""

    def __init__(self, generation: int) -> None:
        super().__init__(tiny_config())
        self.network_id = f"halved {generation}"
        self.generation = generation

    def __call__(self, inputs: NetworkInputs[Any]) -> Any:
        return super().__call__(inputs) * np.float32(0.5**self.generation)


class Shelf:
    """A loader that returns another network each time, or raises an error."""

    def __init__(self) -> None:
        self.may_load = threading.Event()
        self.may_load.set()
        self.asked = threading.Event()
        """Set when a model has been requested."""
        self.loaded = 0

    def __call__(self, folder: Path) -> Denoiser[Any]:
        self.asked.set()
        assert self.may_load.wait(PATIENCE_S)
        if folder.name == "damaged":
            raise ModelError(f"{folder}/model.onnx is damaged")
        self.loaded += 1
        return Halved(self.loaded)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    for name in ("m", "other", "damaged", ".hidden", "bad name"):
        (folder / name).mkdir(parents=True)
    (tmp_path / "secret").mkdir()
    return folder


@asynccontextmanager
async def running(
    root: Path | None, denoiser: PausedDenoiser | None = None, shelf: Shelf | None = None, **settings: Any
) -> AsyncIterator[Service]:
    denoiser = denoiser or PausedDenoiser()
    chosen = Settings(models=(Path("m"),), admin_root=root, max_rows=2, **settings)
    app = assemble(chosen, {"m": denoiser}, shelf or Shelf())
    async with app.router.lifespan_context(app):
        service = Service(app, denoiser)
        del denoiser
        await service.ready()
        try:
            yield service
        finally:
            if hasattr(service, "denoiser"):
                service.denoiser.let.set()


async def change(service: Service, name: str, verb: str = "load", key: str | None = None) -> httpx.Response:
    headers = {"Content-Type": "application/json"} | ({} if key is None else {"Authorization": f"Bearer {key}"})
    return await service.ask("POST", f"/v1/admin/models/{name}/{verb}", headers=headers)


async def picture(service: Service, **body: Any) -> httpx.Response:
    return await service.ask("POST", "/v1/generate", json={"cfg_scale": 1, "class": 1, **body}, headers=NPZ)


def pixels(answer: httpx.Response) -> npt.NDArray[np.uint8]:
    assert answer.status_code == 200, answer.text
    with np.load(io.BytesIO(answer.content), allow_pickle=False) as arrays:
        found: npt.NDArray[np.uint8] = arrays["arr_0"][0]
        return found


def expected(denoiser: Denoiser[Any], steps: int, seed: int) -> npt.NDArray[np.uint8]:
    plan = build_plan(denoiser.config.diffusion, "ancestral", str(steps))
    spec = ImageSpec(seed=seed, image_index=0, class_index=1, cfg_scale=1.0)
    drawn: npt.NDArray[np.uint8] = sample_images(AsNetwork(denoiser), plan, [spec], xp=np)[0]
    return drawn


async def served(service: Service) -> dict[str, str]:
    listed = (await service.ask("GET", "/v1/models")).json()["models"]
    return {model["name"]: model["numerics_id"] for model in listed}


async def letting_steps(service: Service, task: asyncio.Task[httpx.Response]) -> httpx.Response:
    """Let the old weights take steps, one by one, until the task is done."""
    while not task.done():
        service.denoiser.let_steps(1)
        await asyncio.sleep(0.002)
    return task.result()


def test_a_reload_changes_new_images_and_none_in_flight(root: Path) -> None:
    @runs
    async def check() -> None:
        async with running(root) as service:
            (first_id,) = (await served(service)).values()
            old = weakref.ref(service.denoiser)
            service.denoiser.let.clear()
            in_flight = asyncio.create_task(picture(service, steps=1000, seed=1))
            await service.until_accepted(1)
            loaded = await letting_steps(service, asyncio.create_task(change(service, "m")))
            assert loaded.status_code == 200, loaded.text
            assert loaded.json()["numerics_id"] != first_id
            assert await served(service) == {"m": loaded.json()["numerics_id"]}
            assert not in_flight.done()

            after = asyncio.create_task(picture(service, steps=3, seed=1))
            answer = await letting_steps(service, after)
            assert answer.headers["x-numerics-id"] == loaded.json()["numerics_id"]
            np.testing.assert_array_equal(pixels(answer), expected(Halved(1), 3, 1))
            assert not in_flight.done()

            service.denoiser.let.set()
            answer = await in_flight
            assert answer.headers["x-numerics-id"] == first_id
            np.testing.assert_array_equal(pixels(answer), expected(ExactDenoiser(tiny_config()), 1000, 1))
            del service.denoiser
            await eventually(lambda: gc.collect() >= 0 and old() is None)  # the old weights are not kept in memory
            assert await service.metric("iddpm_network_calls_total", model="m") >= 1003

    check()


def test_a_model_that_is_reloaded_while_images_are_read_is_used_as_it_is_then(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, may_read = threading.Event(), threading.Event()

    def slowly(body: Any, config: Any) -> Any:
        reading.set()
        assert may_read.wait(PATIENCE_S)
        return read_given(body, config)

    monkeypatch.setattr(execution, "read_given", slowly)
    image = npy(np.zeros((8, 8, 1), np.float32))

    async def reloaded_meanwhile(service: Service, asked: Coroutine[Any, Any, httpx.Response]) -> httpx.Response:
        reading.clear()
        may_read.clear()
        task = asyncio.create_task(asked)
        await eventually(reading.is_set)
        assert (await change(service, "m")).status_code == 200
        may_read.set()
        return await task

    @runs
    async def check() -> None:
        async with running(root) as service:
            answer = await reloaded_meanwhile(service, picture(service, steps=3, image=image, strength=0.5))
            assert answer.status_code == 200, answer.text
            assert await served(service) == {"m": answer.headers["x-numerics-id"]}

            version = answer.headers["x-numerics-id"]
            data = [0.0] * 64
            tensors: list[dict[str, Any]] = [
                {"name": "image", "shape": [8, 8, 1], "datatype": "FP32", "data": data},
                {"name": "strength", "shape": [1], "datatype": "FP32", "data": [0.5]},
            ]
            infer = service.ask("POST", f"/v2/models/m/versions/{version}/infer", json={"inputs": tensors})
            refused = await reloaded_meanwhile(service, infer)
            assert refused.status_code == 404, refused.text
            assert f"must be one of m, version {(await served(service))['m']}" in refused.text

    check()


def test_a_failed_load_keeps_the_served_models_and_hides_the_path(root: Path) -> None:
    @runs
    async def check() -> None:
        async with running(root) as service:
            before = await served(service)
            refused = await change(service, "damaged")
            assert (refused.status_code, refused.json()["title"]) == (422, "Model cannot be served")
            assert str(root) not in refused.text
            assert "model.onnx" not in refused.text
            assert await served(service) == before
            np.testing.assert_array_equal(
                pixels(await picture(service, steps=3, seed=2)), expected(ExactDenoiser(tiny_config()), 3, 2)
            )
            assert (await change(service, "other")).status_code == 200
            assert list(await served(service)) == ["m", "other"]

    check()


def test_names_resolve_to_folders_of_the_root_only(root: Path) -> None:
    @runs
    async def check() -> None:
        shelf = Shelf()
        async with running(root, shelf=shelf) as service:
            names = [
                "..",
                "%2e%2e",
                "../secret",
                "%2e%2e%2fsecret",
                ".hidden",
                "bad%20name",
                "missing",
                "m%2f..",
                "m%00",
            ]
            for name in [*names, str(root.parent / "secret"), "x" * 65]:
                for verb in ("load", "unload"):
                    answer = await change(service, name, verb)
                    assert answer.status_code in (404, 405, 415), name
                    assert str(root) not in answer.text
        assert shelf.loaded == 0

    check()


def test_memory_is_bounded_and_one_model_is_loaded_at_a_time(root: Path) -> None:
    shelf = Shelf()

    @runs
    async def check() -> None:
        async with running(root, shelf=shelf, max_loaded=2) as service:
            service.denoiser.let.clear()
            in_flight = asyncio.create_task(picture(service, steps=1000))
            await service.until_accepted(1)
            shelf.may_load.clear()
            loading = asyncio.create_task(change(service, "m"))
            await eventually(shelf.asked.is_set)
            for refused in (await change(service, "other"), await change(service, "m", "unload")):
                assert (refused.status_code, refused.json()["title"]) == (409, "Conflict")
            shelf.may_load.set()
            assert (await letting_steps(service, loading)).status_code == 200
            full = await change(service, "m")
            assert (full.status_code, "2 models are in memory, at most 2 may be" in full.text) == (409, True)
            service.denoiser.let.set()
            assert (await in_flight).status_code == 200
            assert (await change(service, "m")).status_code == 200
            assert shelf.loaded == 2

    check()


def test_an_unloaded_model_finishes_its_requests_and_can_be_loaded_again(root: Path) -> None:
    @runs
    async def check() -> None:
        async with running(root) as service:
            last = await change(service, "m", "unload")
            assert (last.status_code, "the only model" in last.text) == (409, True)
            assert (await change(service, "other")).status_code == 200
            service.denoiser.let.clear()
            in_flight = asyncio.create_task(picture(service, steps=4, seed=3))
            await service.until_accepted(1)
            assert (await change(service, "m", "unload")).json() == {"status": "unloaded"}
            assert list(await served(service)) == ["other"]
            metrics = (await service.ask("GET", "/metrics")).text
            assert re.findall(r'^iddpm_model_info\{.*model="(\w+)".*\} 1\.0$', metrics, re.MULTILINE) == ["other"]
            assert (await picture(service, model="m")).status_code == 404
            service.denoiser.let.set()
            np.testing.assert_array_equal(pixels(await in_flight), expected(ExactDenoiser(tiny_config()), 4, 3))
            np.testing.assert_array_equal(pixels(await picture(service, steps=3, seed=4)), expected(Halved(1), 3, 4))
            assert (await change(service, "m")).status_code == 200
            np.testing.assert_array_equal(
                pixels(await picture(service, steps=3, seed=4, model="m")), expected(Halved(2), 3, 4)
            )

    check()


def test_a_model_card_has_the_time_its_weights_were_loaded(root: Path) -> None:
    @runs
    async def check() -> None:
        async with running(root) as service:
            models = service.app.state.service.models
            before = models["m"].loaded_at
            assert (await change(service, "m")).status_code == 200
            assert models["m"].loaded_at > before
            for listed in (
                (await service.ask("GET", "/v1/models")).json()["data"][0],
                (await service.ask("GET", "/v1/models/m")).json(),
            ):
                assert listed["created"] == int(models["m"].loaded_at)

    check()


def test_route_dependencies_run_on_the_event_loop(root: Path) -> None:
    app = assemble(Settings(models=(Path("m"),), admin_root=root), {"m": PausedDenoiser()}, Shelf())
    open_ended = [route.dependant for route in iter_route_contexts(app.routes) if hasattr(route, "dependant")]
    needed = set()
    while open_ended:
        dependencies = open_ended.pop().dependencies
        needed |= {dependency.call for dependency in dependencies}
        open_ended += dependencies
    assert {service_state, check_version, registry_for_admins} <= needed
    assert {call for call in needed if not inspect.iscoroutinefunction(call)} == set()


@runs
async def test_without_a_root_the_routes_do_not_exist() -> None:
    async with running(None) as service:
        assert (await change(service, "m")).status_code == 404
        assert "/v1/admin" not in (await service.ask("GET", "/openapi.json")).text


def test_with_keys_only_administrators_may_change_models(root: Path, tmp_path: Path) -> None:
    keys = {name: new_key() for name in ("alice", "root")}
    stored = [ApiKey(name=n, sha256=hash_of(k), limits=Limits(), admin=n == "root") for n, k in keys.items()]
    write_keys(tmp_path / "keys.json", stored)

    @runs
    async def check() -> None:
        async with running(root, keys_file=tmp_path / "keys.json") as service:
            assert (await change(service, "m")).status_code == 401
            for verb in ("load", "unload"):
                refused = await change(service, "m", verb, keys["alice"])
                assert (refused.status_code, refused.json()["title"]) == (403, "Forbidden")
            assert (await change(service, "m", key=keys["root"])).status_code == 200

    check()


def test_a_valid_artifact_is_reloaded_and_a_damaged_one_is_not(tmp_path: Path) -> None:
    artifact = tmp_path / "models" / "fashion32"
    shutil.copytree(BUNDLED / "artifact", artifact)
    asked: dict[str, Any] = {"steps": 2, "seed": 5}

    @runs
    async def check() -> None:
        settings = Settings(
            models=(artifact,), admin_root=artifact.parent, backend="onnxruntime", threads=1, max_rows=2
        )
        app = create_app(settings)
        async with app.router.lifespan_context(app):
            service = Service(app, PausedDenoiser())
            await service.ready()
            before, first = await served(service), pixels(await picture(service, **asked))
            assert (await change(service, "fashion32")).status_code == 200
            assert await served(service) == before  # unchanged files
            np.testing.assert_array_equal(pixels(await picture(service, **asked)), first)

            graph = (artifact / "model.onnx").read_bytes()
            (artifact / "model.onnx").write_bytes(graph[: len(graph) // 2])
            assert (await change(service, "fashion32")).status_code == 422
            np.testing.assert_array_equal(pixels(await picture(service, **asked)), first)

    check()


def test_a_model_on_a_gpu_cannot_be_reloaded(root: Path) -> None:
    denoiser = PausedDenoiser()
    denoiser.threads = 0
    with pytest.raises(ModelError, match="admin_root: on a CUDA device"):
        assemble(Settings(models=(Path("m"),), admin_root=root), {"m": denoiser}, Shelf())


@runs
async def test_a_model_that_would_run_on_a_gpu_is_not_loaded_beside_others(tmp_path: Path) -> None:
    class OnGpu(Shelf):
        def __call__(self, folder: Path) -> Denoiser[Any]:
            loaded = super().__call__(folder)
            loaded.threads = 0
            return loaded

    (tmp_path / "m").mkdir()
    async with running(tmp_path, shelf=OnGpu()) as service:
        before = await served(service)
        assert (await change(service, "m")).status_code == 422
        assert await served(service) == before


def test_nothing_is_loaded_while_the_service_drains(root: Path) -> None:
    @runs
    async def check() -> None:
        shelf = Shelf()
        async with running(root, shelf=shelf) as service:
            service.app.state.service.engine.drain()
            refused = await change(service, "m")
            assert (refused.status_code, shelf.loaded) == (503, 0)

    check()
