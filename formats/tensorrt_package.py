"""The package with TensorRT's Python API: which one is installed, and its logger. Nothing here imports it.

Two packages have one API: `tensorrt` for GPUs of data centres, `tensorrt_rtx` for RTX cards. Who builds or runs engines
imports the installed one by its name, and hands the module on.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from typing import Any, Literal

from formats.extras import install_command

log = logging.getLogger(__name__)

Flavour = Literal["tensorrt", "tensorrt_rtx"]
EXTRAS: dict[Flavour, str] = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx"}
"""The packages, the one that is taken where both are installed first, and the extra of ours that installs each."""


class EngineError(ValueError):
    """An engine of TensorRT that cannot be built or used; the message names the file and the reason."""


def installed_flavour() -> Flavour:
    """Return the name of the package that is installed.

    Raises:
        EngineError: there is none; says what to install.
    """
    for flavour in EXTRAS:
        spec = importlib.util.find_spec(flavour)
        # A folder `tensorrt` on the path, such as an artifact's, would pass for a package without a file.
        if spec is not None and spec.origin is not None:
            return flavour
    installs = " or, for RTX cards, ".join(install_command(extra) for extra in EXTRAS.values())
    raise EngineError(f"TensorRT is not installed: {installs}")


@functools.cache
def logger_of(trt: Any) -> Any:
    """Return the process's logger for a package, an `ILogger`: TensorRT holds on to the first one it is given.

    Warnings go to logging as information: most are about TensorRT itself. Errors are kept, in `errors`, until somebody
    clears them; `said()` is how they end an exception's message.
    """

    class Logger(trt.ILogger):  # type: ignore[misc]  # a class of an untyped module
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.errors.append(message)
            elif severity == trt.ILogger.WARNING:
                log.info("%s: %s", trt.__name__, message)

        def said(self) -> str:
            return ": " + "; ".join(self.errors) if self.errors else ""

    return Logger()
