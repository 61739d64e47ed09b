"""The routes of an app by path, known before a request is routed: their templates, methods and interfaces."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from fastapi.routing import iter_route_contexts
from starlette.routing import BaseRoute
from starlette.types import Scope

from diffusion.quoting import quoted
from service.api.interfaces import Interface

LONGEST_PATH = 200
"""Characters of a path that a line of text shows."""
MAX_SEGMENTS = 16
"""Of a path that no route has: longer ones are not compared with routes."""
_BY_FIRST_SEGMENT = {"v1": Interface.OPENAI, "v2": Interface.KSERVE}
"""Who probably asks where there is no route: our own clients know the routes."""
ANYBODY = Interface.NATIVE_AND_OPENAI
"""Who asks for any other path: people, or an OpenAI client whose base_url lacks /v1."""


@dataclass(frozen=True)
class Route:
    """All routes of one template."""

    template: str
    """Such as /v1/models/{model}."""
    pattern: re.Pattern[str]
    methods: frozenset[str]
    interface: Interface


class RouteTable:
    """The routes of an app, in the order in which they are tried."""

    def __init__(self, routes: Iterable[BaseRoute]) -> None:
        by_template: dict[str, Route] = {}
        for route in iter_route_contexts(list(routes)):
            if route.path_format is None or route.methods is None:
                continue  # mounted files
            known = by_template.get(route.path_format)
            by_template[route.path_format] = Route(
                template=route.path_format,
                pattern=route.path_regex,
                methods=frozenset(route.methods) | (known.methods if known else frozenset()),
                # The router's route class says it
                interface=getattr(route.original_route, "interface", Interface.NATIVE),
            )
        self._routes = tuple(by_template.values())

    def __iter__(self) -> Iterator[Route]:
        return iter(self._routes)

    def find(self, path: str) -> Route | None:
        """Return the route of a path, whatever the method; None where there is none."""
        return next((route for route in self._routes if route.pattern.match(path)), None)

    def nearest(self, path: str) -> tuple[str, Route] | None:
        """Return the path, and its route, that a path without a route was probably meant to be.

        That is: without slashes too many, without what a proxy should have cut off in front, and with /v1 once.
        """
        segments = _segments(path)
        if len(segments) > MAX_SEGMENTS:
            return None
        version = f"/{segments[0]}/" if segments and segments[0] in _BY_FIRST_SEGMENT else "/"
        for begin in range(len(segments)):
            rest = "/" + "/".join(segments[begin:])
            for meant in (rest, f"/v1{rest}"):
                route = self.find(meant)
                if route is not None and f"{meant}/".startswith(version):
                    return meant, route
        return None

    def interface_of(self, path: str) -> Interface:
        """Return the interface of a path's route; where it has none, of the route that was probably meant."""
        route = self.find(path)
        if route is None and (nearest := self.nearest(path)) is not None:
            _, route = nearest
        if route is not None:
            return route.interface
        return _BY_FIRST_SEGMENT.get(next(iter(_segments(path)), ""), ANYBODY)


def _segments(path: str) -> list[str]:
    return [segment for segment in path.split("/") if segment]


def routes_of(scope: Scope) -> RouteTable:
    """Return the routes of the app that a request came to; an app has them all when its first request comes."""
    app = scope.get("app")
    if app is None:  # a middleware that stands alone
        return RouteTable(())
    if not hasattr(app.state, "routes"):
        app.state.routes = RouteTable(app.routes)
    table = app.state.routes
    assert isinstance(table, RouteTable)  # noqa: S101  # set above
    return table


def interface_of(scope: Scope) -> Interface:
    """Return the interface that a request speaks to."""
    return routes_of(scope).interface_of(scope["path"])


def template_of(scope: Scope) -> str | None:
    """Return the template of a request that has been routed; None where no route took it."""
    if "endpoint" not in scope or "app" not in scope:
        return None
    route = routes_of(scope).find(scope["path"])
    return None if route is None else route.template


def printable(path: str) -> str:
    """Return a path as it may stand in a line of text: printable ASCII as it is, any other as JSON; not a long one."""
    shown = path[:LONGEST_PATH]
    return shown if shown.isascii() and shown.isprintable() else quoted(shown, LONGEST_PATH)
