"""The service itself, around a network that does nothing, at once or in the time of a measured one."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.measured_device import MeasuredDevice, numbers
from benchmarks.null_network import NullDenoiser
from benchmarks.null_servers.loop_lag import LoopLag
from service.http.app import assemble
from service.http.server import serve
from service.logs import configure_logging
from service.settings import Settings


def main() -> None:
    """Serve until a signal."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("port", type=int)
    parser.add_argument("image_size", type=int, nargs="?", default=32)
    parser.add_argument(
        "--call-ms",
        type=numbers,
        metavar="ROWS=MS,...",
        help="milliseconds of a call by batch size, up to IDDPM_MAX_ROWS",
    )
    asked = parser.parse_args()
    configure_logging()
    settings = Settings(models=(Path("null"),), port=asked.port)
    call_s = None if asked.call_ms is None else MeasuredDevice.of_ms(asked.call_ms).call_s
    network = NullDenoiser(asked.image_size, settings.max_rows, call_s)
    app = assemble(settings, {"null": network})
    LoopLag().install(app)
    serve(app, settings)


if __name__ == "__main__":
    main()
