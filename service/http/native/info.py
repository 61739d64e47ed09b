"""Routes that report state and never run the network: models, health, metrics."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Path
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import Response

from diffusion.config import ModelConfig
from diffusion.plans import SAMPLERS
from service.http.health import refusal_if_dead, refusal_if_not_ready
from service.http.interfaces import OpenAIRoute, SharedRoute
from service.http.native.schemas import (
    CascadeInfo,
    CondInfo,
    ModelCard,
    ModelInfo,
    ModelList,
    Problem,
    SamplerInfo,
    Status,
)
from service.http.openai.schemas import OpenAIError
from service.http.state import ServiceState, service_state
from service.models.served_model import ServedModel, find_model
from service.requests.given import cond_file_shape

router = APIRouter()
shared = APIRouter(route_class=SharedRoute)
of_openai = APIRouter(route_class=OpenAIRoute)

State = Annotated[ServiceState, Depends(service_state)]
_RED = {503: {"content": {"application/problem+json": {"schema": Problem.model_json_schema()}}}}


@shared.get("/v1/models", tags=["models"])
async def models(state: State) -> ModelList:
    """List the served models, the default one first: `models` with all details, `data` for OpenAI's SDK."""
    return ModelList(
        data=[_card(model) for model in state.models.values()],
        models=[model_info(model) for model in state.models.values()],
        samplers=samplers(),
    )


def samplers() -> list[SamplerInfo]:
    """Return what clients may know about each sampler."""
    return [
        SamplerInfo(
            name=name,
            options=["eta"] if sampler.takes_eta else [],
            recommended_steps=sampler.recommended_steps,
        )
        for name, sampler in SAMPLERS.items()
    ]


def model_info(model: ServedModel) -> ModelInfo:
    """Return the public details of a model."""
    return ModelInfo(
        name=model.name,
        image_size=model.result_config.model.image_size,
        image_channels=model.result_config.model.image_channels,
        value_range=model.result_config.value_range,
        cascade=_cascade_info(model),
        cond=_cond_info(model.config.model),
        classes=None if model.class_names is None else list(model.class_names),
        num_timesteps=model.config.diffusion.num_timesteps,
        guidance=model.config.model.null_class,
        default_cfg_scale=model.config.sampling.cfg_scale,
        classifier_guidance=model.classifier is not None,
        numerics_id=model.numerics_id,
        backend=model.backend,
    )


@of_openai.get("/v1/models/{model}", tags=["models"], responses={"4XX": {"model": OpenAIError}})
async def model_card(model: Annotated[str, Path(description="Name of the model.")], state: State) -> ModelCard:
    """Return one model in the form that OpenAI's SDK reads."""
    return _card(find_model(state.models, model))


@router.get("/healthz", tags=["health"], response_model=Status, responses=_RED)  # type: ignore[arg-type]
async def healthz(state: State) -> Status | Response:
    """Report whether the process is alive; 503 after the engine has stopped with an error: restart the process."""
    return refusal_if_dead(state.engine) or Status(status="ok")


@router.get("/readyz", tags=["health"], response_model=Status, responses=_RED)  # type: ignore[arg-type]
async def readyz(state: State) -> Status | Response:
    """Report whether requests are accepted: from the end of warm-up until shutdown begins."""
    return refusal_if_not_ready(state.engine) or Status(status="ready")


@router.get("/metrics", tags=["metrics"], response_class=Response)
async def metrics(state: State) -> Response:
    """Return the metrics in Prometheus' text format."""
    state.metrics.set_models((model.name, model.numerics_id, model.backend) for model in state.models.values())
    return Response(generate_latest(state.metrics.registry), media_type=CONTENT_TYPE_LATEST)


router.include_router(shared)
router.include_router(of_openai)


def _cascade_info(model: ServedModel) -> CascadeInfo | None:
    if model.stages is None:
        return None
    base, upsampler = model.stages
    return CascadeInfo(
        base=base.name,
        upsampler=upsampler.name,
        given_size=base.config.model.image_size,
        upsampler_num_timesteps=upsampler.config.diffusion.num_timesteps,
    )


def _cond_info(model: ModelConfig) -> CondInfo | None:
    shape = cond_file_shape(model)
    if shape is None:
        return None
    height, width, channels = shape
    return CondInfo(height=height, width=width, channels=channels, low_resolution=model.low_res_size is not None)


def _card(model: ServedModel) -> ModelCard:
    return ModelCard(id=model.name, created=int(model.loaded_at))
