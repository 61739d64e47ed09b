"""POST /v1/admin/models/NAME/load and /unload: installed if the setting `admin_root` is given."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Request

from service.errors import Forbidden
from service.http.door.context import client_of_request
from service.http.native.info import model_info
from service.http.native.schemas import ModelInfo, Problem, Status
from service.http.state import ServiceState, service_state
from service.models.registry import ModelRegistry


async def registry_for_admins(
    request: Request, state: Annotated[ServiceState, Depends(service_state)]
) -> ModelRegistry:
    """Return the registry to any client of a service without keys, else to a client with an admin key."""
    if state.settings.keys_file is not None and not client_of_request(request.scope).admin:
        raise Forbidden("this needs a key that was made with --admin")
    if state.registry is None:
        raise RuntimeError("the admin routes are installed without a model registry")
    return state.registry


Registry = Annotated[ModelRegistry, Depends(registry_for_admins)]
Name = Annotated[str, Path(description="Name of the model's folder in IDDPM_ADMIN_ROOT.")]

_PROBLEM = {"application/problem+json": {"schema": Problem.model_json_schema()}}
_ERRORS: dict[int | str, dict[str, Any]] = {
    403: {"description": "The key is not an administrator's", "content": _PROBLEM},
    404: {"description": "No such folder, or no such model", "content": _PROBLEM},
    409: {
        "description": "A model is being loaded, as many are in memory as may be, or it is the last",
        "content": _PROBLEM,
    },
    422: {"description": "It cannot be served, and what was served before still is", "content": _PROBLEM},
    503: {"description": "The engine does not accept work", "content": _PROBLEM},
}
router = APIRouter(prefix="/v1/admin/models", tags=["admin"], responses=_ERRORS)


@router.post("/{name}/load")
async def load(name: Name, registry: Registry) -> ModelInfo:
    """Load or reload a model from its folder; the answer is sent when the model accepts requests."""
    return model_info(await registry.load(name))


@router.post("/{name}/unload")
async def unload(name: Name, registry: Registry) -> Status:
    """Unload a model; accepted images are finished."""
    registry.unload(name)
    return Status(status="unloaded")
