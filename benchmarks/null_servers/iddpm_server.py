"""The service itself, around a network that does nothing: PORT [IMAGE_SIZE]."""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.null_network import NullDenoiser
from benchmarks.null_servers.loop_lag import LoopLag
from service.http.app import assemble
from service.http.server import serve
from service.logs import configure_logging
from service.settings import Settings


def main(port: int, image_size: int = 32) -> None:
    """Serve until a signal."""
    configure_logging()
    settings = Settings(models=(Path("null"),), port=port)
    app = assemble(settings, {"null": NullDenoiser(image_size, settings.max_rows)})
    LoopLag().install(app)
    serve(app, settings)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
