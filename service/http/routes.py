"""Look up the routes of an app by path before a request is routed: templates, methods and interfaces."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from fastapi.routing import iter_route_contexts
from starlette.routing import BaseRoute
from starlette.types import Scope

from diffusion.quoting import quoted
from service.http.interfaces import Interface

LONGEST_PATH = 200
"""Maximum number of characters of a path in a log line or message."""
MAX_SEGMENTS = 16
"""Maximum number of segments of a path for which a similar route is searched."""
_BY_FIRST_SEGMENT = {"v1": Interface.OPENAI, "v2": Interface.KSERVE}
"""Interfaces of paths without a route, by first segment; native clients do not request these."""
FALLBACK_INTERFACE = Interface.NATIVE_AND_OPENAI
"""The interface of other paths without a route, used by people or OpenAI clients whose base_url lacks /v1."""


@dataclass(frozen=True)
class Route:
    """All routes of one template."""

    template: str
    """The path template, such as /v1/models/{model}."""
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
                interface=getattr(route.original_route, "interface", Interface.NATIVE),  # see JsonRoute's subclasses
            )
        self._routes = tuple(by_template.values())

    def __iter__(self) -> Iterator[Route]:
        return iter(self._routes)

    def find(self, path: str) -> Route | None:
        """Return the route of a path for any method; None if there is none."""
        return next((route for route in self._routes if route.pattern.match(path)), None)

    def nearest(self, path: str) -> tuple[str, Route] | None:
        """Return the path and route that a path without a route probably means; None if no route is similar.

        It tries the path without empty segments, without leading segments (a prefix that the proxy should have
        removed), and with /v1 in front.
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
        """Return the interface of a path's route, else of the nearest route, else by the first segment."""
        route = self.find(path)
        if route is None and (nearest := self.nearest(path)) is not None:
            _, route = nearest
        if route is not None:
            return route.interface
        return _BY_FIRST_SEGMENT.get(next(iter(_segments(path)), ""), FALLBACK_INTERFACE)


def _segments(path: str) -> list[str]:
    return [segment for segment in path.split("/") if segment]


def routes_of(scope: Scope) -> RouteTable:
    """Return the routes of the app of a request. They are read once, as all routes exist before the first request."""
    app = scope.get("app")
    if app is None:  # a middleware without an app
        return RouteTable(())
    if not hasattr(app.state, "routes"):
        app.state.routes = RouteTable(app.routes)
    table = app.state.routes
    assert isinstance(table, RouteTable)  # noqa: S101  # set above
    return table


def interface_of(scope: Scope) -> Interface:
    """Return the interface of a request."""
    return routes_of(scope).interface_of(scope["path"])


def template_of(scope: Scope) -> str | None:
    """Return the template of a routed request; None if no route matched."""
    if "endpoint" not in scope or "app" not in scope:
        return None
    route = routes_of(scope).find(scope["path"])
    return None if route is None else route.template


def printable(path: str) -> str:
    """Return a path for logs and messages, cut to `LONGEST_PATH`; JSON-quoted unless it is printable ASCII."""
    shown = path[:LONGEST_PATH]
    return shown if shown.isascii() and shown.isprintable() else quoted(shown, LONGEST_PATH)
