"""GET /docs: the OpenAPI document for people. The one page that loads something from elsewhere: Swagger UI."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.responses import Response

router = APIRouter()

_SWAGGER = "https://cdn.jsdelivr.net"
_POLICY = (
    f"default-src 'none'; script-src 'unsafe-inline' {_SWAGGER}; style-src 'unsafe-inline' {_SWAGGER}; "
    "img-src data:; connect-src 'self'; frame-ancestors 'none'"
)


@router.get("/docs", include_in_schema=False)
async def docs() -> Response:
    """Show the routes, their fields and their answers."""
    page = get_swagger_ui_html(openapi_url="/openapi.json", title="iddpm", swagger_favicon_url="data:,")
    page.headers["Content-Security-Policy"] = _POLICY
    return page
