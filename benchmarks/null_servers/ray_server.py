"""The service in Ray Serve, around a network that does nothing: a cluster of one node with one replica.

Serve's proxy logs its requests, as it does by default.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from fastapi import FastAPI

REPOSITORY = Path(__file__).parents[2]


def main(port: int) -> None:
    """Serve until a signal."""
    os.environ["RAY_AUTH_MODE"] = "disabled"  # read when ray is imported; else it writes a token into the home folder
    os.environ["PYTHONPATH"] = str(REPOSITORY)  # of the replica's process

    import ray
    from ray import serve

    from benchmarks.null_network import NullDenoiser
    from benchmarks.null_servers.loop_lag import LoopLag
    from deploy.ray.serve_app import Fleet, Replica, deployed
    from service.http.app import assemble
    from service.settings import Settings

    class NullReplica(Replica):
        """A replica around the null network."""

        def application(self, settings: Settings) -> FastAPI:
            app = assemble(settings, {"null": NullDenoiser(32, settings.max_rows)})
            LoopLag().install(app)
            return app

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(deployed(NullReplica, Fleet(), Settings(models=(Path("null"),))))
        signal.pause()
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]))
