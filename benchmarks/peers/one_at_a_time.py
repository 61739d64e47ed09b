"""One request at a time behind a lock, its images together: a plain FastAPI app with iddpm's or diffusers' network."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import uvicorn
from fastapi import Body, FastAPI, Response

from benchmarks.peers.options import peer_parser
from benchmarks.peers.request_sampler import RequestSampler, Sampler


def create_app(sampler: Sampler) -> FastAPI:
    """Build the application: waiting requests are processed in order of arrival."""
    app = FastAPI()
    turn = asyncio.Lock()

    @app.get("/ready")
    async def ready() -> None:
        """Answer when the application is running."""

    @app.post("/generate")
    async def generate(
        n: Annotated[int, Body()],
        steps: Annotated[int, Body()],
        seed: Annotated[int, Body()],
        label: Annotated[int, Body(alias="class")],
    ) -> Response:
        """Answer uint8 [n, H, W, C]."""
        async with turn:
            pixels = await asyncio.to_thread(sampler, steps, [seed] * n, range(n), [label] * n)
        return Response(pixels.tobytes(), media_type="application/octet-stream")

    return app


def main() -> None:
    """Serve until a signal."""
    parser = peer_parser(__doc__)
    parser.add_argument("--diffusers", type=Path, help="a diffusers folder of the same network, to run instead")
    asked = parser.parse_args()
    sampler: Sampler
    if asked.diffusers:
        from benchmarks.peers.diffusers_sampler import DiffusersSampler

        sampler = DiffusersSampler(asked.diffusers, asked.meter, threads=asked.threads)
    else:
        sampler = RequestSampler(
            asked.model,
            asked.meter,
            width=asked.width,
            threads=asked.threads,
            turns="batch",
            device_ms=asked.device_ms,
        )
    uvicorn.run(create_app(sampler), host="127.0.0.1", port=asked.port, log_level="warning")


if __name__ == "__main__":
    main()
