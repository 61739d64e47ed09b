"""The package with TensorRT's Python API: find the installed one, and its logger. Nothing here imports it.

Two packages have the same API: `tensorrt` for data-centre GPUs, `tensorrt_rtx` for RTX cards. Code that builds or runs
engines imports the installed one by its name and passes the module on.
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
"""The extra of iddpm that installs each package; the first package is preferred if both are installed."""


class EngineError(ValueError):
    """A TensorRT engine cannot be built or used; the message names the file and the reason."""


def installed_flavour() -> Flavour:
    """Return the name of the installed package.

    Raises:
        EngineError: none is installed; the message has the install command.
    """
    for flavour in EXTRAS:
        spec = importlib.util.find_spec(flavour)
        # A folder `tensorrt` on the path, such as an artifact's, is found as a namespace package without a file.
        if spec is not None and spec.origin is not None:
            return flavour
    installs = " or, for RTX cards, ".join(install_command(extra) for extra in EXTRAS.values())
    raise EngineError(f"TensorRT is not installed: {installs}")


@functools.cache
def logger_of(trt: Any) -> Any:
    """Return the process's logger for a package, an `ILogger`: TensorRT keeps the first logger it gets.

    Warnings are logged at level INFO, because most are about TensorRT itself. Errors are kept in `errors` until the
    caller clears them; `error_suffix()` formats them for the end of an exception's message.
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

        def error_suffix(self) -> str:
            return ": " + "; ".join(self.errors) if self.errors else ""

    return Logger()
