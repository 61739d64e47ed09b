"""Which route a request came to, by its template: /v1/models/{model}, whatever the model."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from fastapi.routing import iter_route_contexts
from starlette.types import Scope

_PARAMETER = re.compile(r"\{(\w+)\}")


class RouteTemplates:
    """The templates of an app's routes, whole: a route in the scope does not know what it was included under."""

    def __init__(self) -> None:
        self._templates: dict[tuple[Callable[..., Any], frozenset[str]], str] | None = None

    def of(self, scope: Scope) -> str | None:
        """Return the template of a request that has been routed; None where no route took it."""
        if "endpoint" not in scope or "app" not in scope:
            return None
        if self._templates is None:
            self._templates = {
                (route.endpoint, frozenset(_PARAMETER.findall(route.path_format))): route.path_format
                for route in iter_route_contexts(scope["app"].routes)
                if route.endpoint is not None and route.path_format is not None
            }
        return self._templates.get((scope["endpoint"], frozenset(scope["path_params"])))
