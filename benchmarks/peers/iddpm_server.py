"""`iddpm serve` with a meter around the network, and nothing else changed: settings come from IDDPM_* as always."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.peers.meter import Meter, MeteredBackend
from service.api.app import assemble, model_name
from service.api.logs import configure_logging
from service.api.server import serve
from service.settings import Settings


def main() -> None:
    """Serve until a signal."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--meter", type=Path, required=True)
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    configure_logging()
    settings = Settings(models=(asked.model,), port=asked.port, max_rows=asked.width, threads=asked.threads)
    network = MeteredBackend(asked.model, settings.backend_options(), Meter(asked.meter))
    serve(assemble(settings, {model_name(asked.model): network}), settings)


if __name__ == "__main__":
    main()
