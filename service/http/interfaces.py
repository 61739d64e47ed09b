"""The interfaces of the service, and the route classes by which a router assigns its routes to one."""

from __future__ import annotations

import enum
import re

from service.http.door.json_body import JsonRoute

_INFER = r"/v2/models/[^/]+(/versions/[^/]+)?/infer"
_GENERATES = re.compile(rf"/v1/(generate|encode|denoise)|/v1/images/(generations|edits)|{_INFER}")
_TAKES_IMAGES = re.compile(rf"/v1/(generate|encode|denoise)|/v1/images/edits|{_INFER}")
_TAKES_LISTS = re.compile(_INFER)
EDITS = "/v1/images/edits"


class Interface(enum.Enum):
    """The API whose format of answers a client expects, above all of errors."""

    NATIVE = "native"
    OPENAI = "openai"
    KSERVE = "kserve"
    NATIVE_AND_OPENAI = "native and openai"
    """For routes where clients of both send the same request; an error has the members of both formats."""


class NativeRoute(JsonRoute):
    """Route class of routers of the native interface."""

    interface = Interface.NATIVE


class OpenAIRoute(JsonRoute):
    """Route class of routers of OpenAI's interface."""

    interface = Interface.OPENAI


class KserveRoute(JsonRoute):
    """Route class of routers of the Open Inference Protocol (KServe v2)."""

    interface = Interface.KSERVE


class SharedRoute(JsonRoute):
    """Route class of routers whose routes belong to the native interface and OpenAI's."""

    interface = Interface.NATIVE_AND_OPENAI


def takes_images(method: str, path: str) -> bool:
    """Return whether a request may have given images in its body, which may then be long."""
    return method == "POST" and _TAKES_IMAGES.fullmatch(path) is not None


def takes_lists(path: str) -> bool:
    """Return whether given images may be JSON lists of numbers."""
    return _TAKES_LISTS.fullmatch(path) is not None


def takes_form(path: str) -> bool:
    """Return whether the body of a request is a multipart form; it is JSON otherwise."""
    return path == EDITS


def generates(method: str, path: str) -> bool:
    """Return whether a request generates images."""
    return method == "POST" and _GENERATES.fullmatch(path) is not None
