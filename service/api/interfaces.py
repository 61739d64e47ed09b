"""Which interface a path belongs to: ours, OpenAI's Images, or the Open Inference Protocol (KServe v2)."""

from __future__ import annotations

import enum
import re

_OPENAI = re.compile(r"/v1/(images|models)/.+", re.DOTALL)
_KSERVE = re.compile(r"/v2(/.*)?", re.DOTALL)
_GENERATES = re.compile(r"/v1/generate|/v1/images/generations|/v2/models/[^/]+(/versions/[^/]+)?/infer")


class Interface(enum.Enum):
    """Whose words a client expects, in errors most of all."""

    NATIVE = "native"
    OPENAI = "openai"
    KSERVE = "kserve"


def interface_of(path: str) -> Interface:
    """Return the interface of a path; of one that no route has, too."""
    if _KSERVE.fullmatch(path):
        return Interface.KSERVE
    return Interface.OPENAI if _OPENAI.fullmatch(path) else Interface.NATIVE


def generates(method: str, path: str) -> bool:
    """Say whether a request asks for images."""
    return method == "POST" and _GENERATES.fullmatch(path) is not None
