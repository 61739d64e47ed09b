"""The routes of an app by path, known before a request is routed: their templates, methods and interfaces."""

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
"""Characters of a path that a line of text shows."""
MAX_SEGMENTS = 16
"""A path with more segments is not searched for a route that may have been meant."""
_BY_FIRST_SEGMENT = {"v1": Interface.OPENAI, "v2": Interface.KSERVE}
"""The interface of paths without a route: our own clients do not ask for these."""
ANYBODY = Interface.NATIVE_AND_OPENAI
"""The interface of other paths without a route: a person may ask, or an OpenAI client whose base_url lacks /v1."""


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
                interface=getattr(route.original_route, "interface", Interface.NATIVE),  # see JsonRoute's subclasses
            )
        self._routes = tuple(by_template.values())

    def __iter__(self) -> Iterator[Route]:
        return iter(self._routes)

    def find(self, path: str) -> Route | None:
        """Return the route of a path, whatever the method; None where there is none."""
        return next((route for route in self._routes if route.pattern.match(path)), None)

    def nearest(self, path: str) -> tuple[str, Route] | None:
        """Return the path, and its route, that was probably meant by a path without a route; None where none is near.

        Tried are: without empty segments, without leading segments (a prefix that the proxy should have removed), and
        with /v1 before it.
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
        return _BY_FIRST_SEGMENT.get(next(iter(_segments(path)), ""), ANYBODY)


def _segments(path: str) -> list[str]:
    return [segment for segment in path.split("/") if segment]


def routes_of(scope: Scope) -> RouteTable:
    """Return the routes of the app of a request. They are read once: all are there before the first request."""
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
    """Return the template of a request that has been routed; None where no route took it."""
    if "endpoint" not in scope or "app" not in scope:
        return None
    route = routes_of(scope).find(scope["path"])
    return None if route is None else route.template


def printable(path: str) -> str:
    """Return a path for a line of text, cut to `LONGEST_PATH`: printable ASCII as it is, any other as JSON."""
    shown = path[:LONGEST_PATH]
    return shown if shown.isascii() and shown.isprintable() else quoted(shown, LONGEST_PATH)
