"""The OpenAPI document: GET /openapi.json, and /docs for people, the one page that loads from elsewhere: Swagger UI."""

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
    """Describe all routes. Not asynchronous: FastAPI calls it in a thread, as the first time takes long."""
    return JSONResponse(request.app.openapi())


@router.get("/docs", include_in_schema=False)
async def docs() -> Response:
    """Show the routes, their fields and their answers."""
    page = get_swagger_ui_html(openapi_url="openapi.json", title="iddpm", swagger_favicon_url="data:,")
    page.headers["Content-Security-Policy"] = _POLICY
    return page
