"""The parts of the running service, which handlers get through one typed dependency."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastapi import Request

from service.engine.async_engine import AsyncEngine
from service.http.encoding_pool import EncodingPool
from service.http.page.thumbnails import Thumbnails
from service.metrics import Metrics
from service.models.registry import ModelRegistry
from service.models.served_model import ServedModel
from service.settings import Settings

if TYPE_CHECKING:
    from service.http.tracing import Tracing  # needs the extra otel


@dataclass(frozen=True)
class ServiceState:
    """The parts of one running service."""

    settings: Settings
    models: dict[str, ServedModel]
    engine: AsyncEngine
    metrics: Metrics
    encoding: EncodingPool
    thumbnails: Thumbnails
    registry: ModelRegistry | None = None
    """Loads and unloads models; None if the settings do not allow it."""
    tracing: Tracing | None = None
    """Reports requests to a collector; None if the setting `traces` is off."""


async def service_state(request: Request) -> ServiceState:
    """Return the state of the app. Asynchronous, because FastAPI calls synchronous dependencies in a thread."""
    state = request.app.state.service
    assert isinstance(state, ServiceState)  # noqa: S101  # set by create_app's lifespan
    return state
