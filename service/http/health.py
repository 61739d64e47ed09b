"""Liveness and readiness, as the health routes of every interface report them."""

from __future__ import annotations

from starlette.responses import Response

from service.engine.async_engine import AsyncEngine, EngineState
from service.http.problems import problem

HEALTH_PATHS = frozenset({"/healthz", "/readyz", "/v2/health/live", "/v2/health/ready"})
"""Served for any Host header and without a key, for probes; the answers contain no secrets."""
QUIET_PATHS = HEALTH_PATHS | {"/metrics"}
"""Requested by machines every few seconds: logged at DEBUG only, and answered even above the connection limit."""


def refusal_if_dead(engine: AsyncEngine) -> Response | None:
    """Return the answer 503 if the engine is dead, else None."""
    if engine.state is not EngineState.DEAD:
        return None
    return problem(503, "Engine stopped", "the engine has stopped with an error, or hangs")


def refusal_if_not_ready(engine: AsyncEngine) -> Response | None:
    """Return the answer 503 if requests are not accepted, else None."""
    if engine.state is EngineState.READY:
        return None
    return problem(503, "Not ready", f"the engine is {engine.state.value}")
