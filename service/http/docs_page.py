"""Serve the OpenAPI document: /openapi.json, and Swagger UI at /docs, the only page that loads from other origins."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.responses import JSONResponse, Response

router = APIRouter()

_SWAGGER = "https://cdn.jsdelivr.net"
_POLICY = (
    f"default-src 'none'; script-src 'unsafe-inline' {_SWAGGER}; style-src 'unsafe-inline' {_SWAGGER}; "
    "img-src data:; connect-src 'self'; frame-ancestors 'none'"
)


@router.get("/openapi.json", include_in_schema=False)
def openapi(request: Request) -> Response:
    """Return the OpenAPI document. Synchronous, so that FastAPI runs it in a thread: the first call is slow."""
    return JSONResponse(request.app.openapi())


@router.get("/docs", include_in_schema=False)
async def docs() -> Response:
    """Return the page with Swagger UI."""
    page = get_swagger_ui_html(openapi_url="openapi.json", title="iddpm", swagger_favicon_url="data:,")
    page.headers["Content-Security-Policy"] = _POLICY
    return page
