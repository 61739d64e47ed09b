"""The interfaces of the service, and the route classes by which a router says to which of them its routes belong."""

from __future__ import annotations

import enum
import re

from service.http.door.json_body import JsonRoute

_GENERATES = re.compile(r"/v1/generate|/v1/images/generations|/v2/models/[^/]+(/versions/[^/]+)?/infer")


class Interface(enum.Enum):
    """What a client expects answers to look like, errors most of all."""

    NATIVE = "native"
    OPENAI = "openai"
    KSERVE = "kserve"
    NATIVE_AND_OPENAI = "native and openai"
    """Clients of both send the same request there; an error has the members of both."""


class NativeRoute(JsonRoute):
    """Route class of routers of our own interface."""

    interface = Interface.NATIVE


class OpenAIRoute(JsonRoute):
    """Route class of routers of OpenAI's interface."""

    interface = Interface.OPENAI


class KserveRoute(JsonRoute):
    """Route class of routers of the Open Inference Protocol (KServe v2)."""

    interface = Interface.KSERVE


class SharedRoute(JsonRoute):
    """Route class of routers whose routes are ours and OpenAI's."""

    interface = Interface.NATIVE_AND_OPENAI


def generates(method: str, path: str) -> bool:
    """Return whether a request asks for images."""
    return method == "POST" and _GENERATES.fullmatch(path) is not None
