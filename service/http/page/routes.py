"""Serve the page at `/` from static/, with a Content-Security-Policy that blocks all other origins."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Depends, FastAPI, Header, HTTPException, Request
from starlette.responses import Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from diffusion.quoting import quoted
from service.encoding import CHANNELS
from service.http.state import ServiceState, service_state
from service.models.served_model import find_model

FOLDER = Path(__file__).with_name("static")
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""No inline code and no other origins; images may also come from answers that the page has read (blob:, data:)."""

State = Annotated[ServiceState, Depends(service_state)]

router = APIRouter(include_in_schema=False)


class PageFiles(StaticFiles):
    """Static files that browsers cache but revalidate every time, so that an update does not mix old and new files."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        """Return one file, or 304 if it has not changed."""
        response = await super().get_response(path, scope)
        response.headers["Cache-Control"] = "no-cache"
        response.headers["Content-Security-Policy"] = POLICY
        return response


def install(app: FastAPI) -> None:
    """Serve the page at `/` and its files under `/page/`. Its links are relative, so a proxy may add a prefix."""
    files = PageFiles(directory=FOLDER)

    @app.get("/", include_in_schema=False)
    async def page(request: Request) -> Response:
        return await files.get_response("index.html", request.scope)

    app.mount("/page", files)
    app.include_router(router)


@router.get("/v1/models/{name}/thumbnails/{class_index}")
async def thumbnail(
    name: str, class_index: int, state: State, x_requested_with: Annotated[str | None, Header()] = None
) -> Response:
    """Return the thumbnail of a class.

    The header X-Requested-With is required because pages of other origins cannot send it without a preflight. So only
    the page of this service can cause work by a GET.
    """
    if x_requested_with is None:
        raise HTTPException(403, "X-Requested-With: the header is required, with any value")
    model = find_model(state.models, name)
    has_pictures = model.config.model.image_channels in CHANNELS["png"]
    if not has_pictures or class_index not in range(len(model.class_names or ())):
        raise HTTPException(404, f"model {quoted(name)} has no thumbnail of class {class_index}")
    return Response(await state.thumbnails.get(model, class_index), media_type="image/png")
