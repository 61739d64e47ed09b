"""What handlers reach through one typed dependency."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastapi import Request

from service.engine.async_engine import AsyncEngine
from service.http.door.client import Client
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
    """Loads and unloads models; None: nobody may."""
    tracing: Tracing | None = None
    """Tells a collector of requests; None: nobody asked for that."""


def asking_client(request: Request) -> Client:
    """Return who a request is from."""
    client = request.state.client
    assert isinstance(client, Client)  # noqa: S101  # set by Identify
    return client


async def service_state(request: Request) -> ServiceState:
    """Return the state of the app that a request came to. Asynchronous, as FastAPI calls others in a thread."""
    state = request.app.state.service
    assert isinstance(state, ServiceState)  # noqa: S101  # set by create_app's lifespan
    return state
