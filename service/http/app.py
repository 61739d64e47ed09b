"""Create the application: load the models and connect engine, routes and error handling. No global state."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import FastAPI
from starlette.types import Scope

from formats.extras import install_command
from formats.tensorrt_files import BuildEngines
from service.backends.ensemble import LoadedModel
from service.backends.select import load_model
from service.cpus import available_cpus
from service.engine.activity import Activity
from service.engine.async_engine import AsyncEngine, EngineState
from service.engine.engine import Engine
from service.engine.runners.array_runner import ArrayRunner
from service.engine.runners.base import Runner
from service.errors import ModelError, TracingError
from service.http import docs_page, problems
from service.http.door.body import WholeBody
from service.http.door.guard import Guard
from service.http.door.idempotency import Idempotency
from service.http.door.identify import Identify
from service.http.door.key_ring import KeyRing
from service.http.door.keys import require_keys
from service.http.door.observe import Observe
from service.http.door.request_line import HeadAsGet, OriginForm
from service.http.encoding_pool import EncodingPool
from service.http.interfaces import takes_images, takes_lists
from service.http.kserve import routes as kserve
from service.http.loop_lag import measure_loop_lag
from service.http.native import admin, arrays, generate, info
from service.http.openai import routes as openai
from service.http.page import routes as page
from service.http.page.thumbnails import Thumbnails
from service.http.state import ServiceState
from service.logs import SHOWN_EARLY
from service.metrics import Metrics
from service.models.cascades import linked
from service.models.registry import LoadModel, ModelRegistry, served_model
from service.models.served_model import ServedModel
from service.requests.given import body_bytes
from service.settings import Settings

if TYPE_CHECKING:
    from service.http.tracing import Tracing  # needs the extra otel

log = logging.getLogger(__name__)


def create_app(settings: Settings, build_engines: BuildEngines | None = None) -> FastAPI:
    """Build the application. Models are loaded here, so that an unusable folder ends start-up with the reason.

    Args:
        settings: the settings.
        build_engines: builds TensorRT engines, which the service cannot do; required if the setting `build_engines` is
            on.

    Raises:
        ModelError: a model folder cannot be served, or not with these settings.
        KeysError: the keys file cannot be read.
        TracingError: the setting `traces` is on, and a package is missing or a variable OTEL_* is not supported.
    """
    if settings.build_engines and build_engines is None:
        raise ModelError("build_engines: this application has no builder of engines; use iddpm serve --build")
    options = replace(settings.backend_options(), build_engines=build_engines if settings.build_engines else None)
    if settings.keys_file is not None:
        require_keys(settings.keys_file)  # before models are loaded, which takes longer
    tracing = _tracing() if settings.traces else None

    def load(folder: Path) -> LoadedModel:
        log.info("loading %s", folder, extra=SHOWN_EARLY)
        return load_model(folder, settings.backend, options)

    return assemble(settings, {name: load(folder) for name, folder in settings.model_folders.items()}, load, tracing)


def assemble(
    settings: Settings,
    denoisers: Mapping[str, LoadedModel],
    load: LoadModel | None = None,
    tracing: Tracing | None = None,
) -> FastAPI:
    """Wire an application around networks that are already loaded.

    The lifespan may be entered again after it was left; it then serves the models that were served last.

    Args:
        settings: the settings.
        denoisers: networks by name, the default one first.
        load: loads other models, if the settings allow that.
        tracing: reports requests during each lifespan; None: requests are not reported.

    Raises:
        ModelError: a network was compiled for batches smaller than `max_rows`, two models do not make a cascade, or
            `admin_root` is unusable.
        KeysError: the keys file cannot be read.
    """
    config = settings.engine_config()
    metrics, activity = Metrics(), Activity()
    runners: dict[str, Runner] = {name: ArrayRunner(denoiser, config) for name, denoiser in denoisers.items()}
    served = {name: served_model(name, denoiser, runners[name].numerics_id) for name, denoiser in denoisers.items()}
    cascades = settings.cascade_models
    served |= {cascade.name: linked(cascade, served) for cascade in cascades}
    root = settings.admin_root
    if root is not None:
        _refuse_unfit_admin_root(root, denoisers.values())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if not runners:
            raise RuntimeError("the app has no models: it is running already, or its engine stopped with an error")
        if tracing is not None:
            tracing.open()
        owner = Engine(runners, config, metrics, activity=activity)
        runners.clear()  # while running, only the engine refers to the networks, so that it can free unloaded ones
        engine = AsyncEngine(owner, config, metrics)
        encoding = EncodingPool()
        registry = None
        if root is not None and load is not None:
            registry = ModelRegistry(served, engine, config, load, root, settings.max_loaded, cascades)
        app.state.service = ServiceState(
            settings, served, engine, metrics, encoding, Thumbnails(engine, encoding), registry, tracing
        )
        log.info("settings: %s", settings.model_dump_json())
        log.info("processors: %s", available_cpus())
        for model in served.values():
            log.info(
                "model %s: %s, %d threads, numerics_id %s",
                model.name, model.backend, model.threads, model.numerics_id,
            )  # fmt: skip
        log.info("warming up", extra=SHOWN_EARLY)
        engine.start()
        lag = asyncio.create_task(measure_loop_lag(metrics.loop_lag_seconds))
        yield
        await engine.stop()
        if engine.state is EngineState.STOPPED:  # a dead engine's thread may still use them
            names = {model.engine_id for model in served.values()}  # a retired model may not have been dropped yet
            runners.update({name: runner for name, runner in owner.runners.items() if name in names})
        if tracing is not None:
            await asyncio.to_thread(tracing.close)
        lag.cancel()
        encoding.close()

    app = FastAPI(
        title="iddpm",
        version=version("iddpm"),
        summary="Images from diffusion models of the Improved DDPM family",
        lifespan=lifespan,
        servers=[{"url": ".", "description": "the location of this document, including any prefix that a proxy adds"}],
        root_path_in_servers=False,
        docs_url=None,  # docs_page.py serves it, as the document
        openapi_url=None,
        redoc_url=None,
        redirect_slashes=False,  # Location would be an absolute URL, whose scheme and prefix are unknown behind a proxy
        # FastAPI's tracing would report query strings and exception messages; tracing.py replaces it
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )
    app.include_router(generate.router)
    app.include_router(arrays.router)
    app.include_router(openai.router)
    app.include_router(kserve.router)
    app.include_router(info.router)
    app.include_router(docs_page.router)
    if root is not None:
        app.include_router(admin.router)
    page.install(app)
    problems.install(app)
    keys = None if settings.keys_file is None else KeyRing(settings.keys_file)
    # From the inside out: a request passes the last middleware first.
    app.add_middleware(Idempotency, max_bytes=settings.max_kept_bytes, keep_s=settings.keep_answers_s)
    app.add_middleware(
        WholeBody,
        max_bytes=settings.max_body_bytes,
        given_bytes=partial(_given_bytes, served),
        max_large_bytes=settings.max_given_bytes,
    )
    app.add_middleware(Identify, keys=keys, trusted_proxies=settings.trusted_proxies)
    app.add_middleware(Guard, allowed_hosts=settings.allowed_hosts)
    app.add_middleware(HeadAsGet)
    app.add_middleware(Observe, metrics=metrics)
    if tracing is not None:
        from service.http.tracing import Traced

        app.add_middleware(Traced, tracing=tracing)
    app.add_middleware(OriginForm)
    return app


def _given_bytes(served: Mapping[str, ServedModel], scope: Scope) -> int:
    """Return the bytes that the given images of a request may take, for the largest model."""
    if not takes_images(scope["method"], scope["path"]):
        return 0
    as_lists = takes_lists(scope["path"])
    return max((body_bytes(model.config.model, as_lists=as_lists) for model in served.values()), default=0)


def _tracing() -> Tracing:
    try:
        from service.http.tracing import tracing_to_collector
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("opentelemetry"):
            raise
        raise TracingError(f"traces need {error.name}, which is not installed: {install_command('otel')}") from error
    return tracing_to_collector()


def _refuse_unfit_admin_root(root: Path, denoisers: Iterable[LoadedModel]) -> None:
    if not root.is_dir():
        raise ModelError(f"admin_root: {root} is not a folder")
    if any(denoiser.threads == 0 for denoiser in denoisers):
        # A CUDA graph would be captured while another thread uses the device, which has not been tested
        raise ModelError("admin_root: on a CUDA device models cannot be loaded while others run; leave it out")
