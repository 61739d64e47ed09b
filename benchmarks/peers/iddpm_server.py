"""`iddpm serve` with a meter around the network, and nothing else changed: settings come from IDDPM_* as always."""

from __future__ import annotations

from benchmarks.peers.meter import metered_network
from benchmarks.peers.options import peer_parser
from service.http.app import assemble
from service.http.server import serve
from service.logs import configure_logging
from service.settings import Settings


def main() -> None:
    """Serve until a signal."""
    asked = peer_parser(__doc__).parse_args()
    configure_logging()
    settings = Settings(models=(asked.model,), port=asked.port, max_rows=asked.width, threads=asked.threads)
    network = metered_network(asked.model, settings.backend_options(), asked.meter, asked.device_ms)
    serve(assemble(settings, dict.fromkeys(settings.model_folders, network)), settings)


if __name__ == "__main__":
    main()
