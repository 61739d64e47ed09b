"""Whose words a client expects: ours, OpenAI's Images', or the Open Inference Protocol's (KServe v2)."""

from __future__ import annotations

import enum
import re

from service.api.json_body import JsonRoute

_GENERATES = re.compile(r"/v1/generate|/v1/images/generations|/v2/models/[^/]+(/versions/[^/]+)?/infer")


class Interface(enum.Enum):
    """How a client reads answers, errors most of all."""

    NATIVE = "native"
    OPENAI = "openai"
    KSERVE = "kserve"
    NATIVE_AND_OPENAI = "native and openai"
    """Both kinds of clients ask there, in the same way."""


class NativeRoute(JsonRoute):
    """Route class of routers that our own clients use, and people."""

    interface = Interface.NATIVE


class OpenAIRoute(JsonRoute):
    """Route class of routers that OpenAI's clients use."""

    interface = Interface.OPENAI


class KserveRoute(JsonRoute):
    """Route class of routers that clients of the Open Inference Protocol use."""

    interface = Interface.KSERVE


class SharedRoute(JsonRoute):
    """Route class of routers that our clients and OpenAI's use."""

    interface = Interface.NATIVE_AND_OPENAI


def generates(method: str, path: str) -> bool:
    """Return whether a request asks for images."""
    return method == "POST" and _GENERATES.fullmatch(path) is not None
