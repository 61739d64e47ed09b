"""Whether the service lives, and whether it takes requests, as every interface's health routes answer it."""

from __future__ import annotations

from starlette.responses import Response

from service.engine.async_engine import AsyncEngine, EngineState
from service.http.problems import problem

HEALTH_PATHS = frozenset({"/healthz", "/readyz", "/v2/health/live", "/v2/health/ready"})
"""Machines ask here every few seconds, by whatever address they have; what is told is no secret."""
QUIET_PATHS = HEALTH_PATHS | {"/metrics"}
"""Asked for by machines every few seconds, in trouble above all: logged at DEBUG only, and answered without a place."""


def refusal_if_dead(engine: AsyncEngine) -> Response | None:
    """Return the red answer of "is the process alive"; None: it is."""
    if engine.state is not EngineState.DEAD:
        return None
    return problem(503, "Engine stopped", "the engine has stopped with an error, or hangs")


def refusal_if_not_ready(engine: AsyncEngine) -> Response | None:
    """Return the red answer of "are requests accepted"; None: they are."""
    if engine.state is EngineState.READY:
        return None
    return problem(503, "Not ready", f"the engine is {engine.state.value}")
