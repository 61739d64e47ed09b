"""A bare FastAPI app under uvicorn: validates the same request, answers with as many fields and one picture."""

from __future__ import annotations

import base64
import sys

import numpy as np
import uvicorn
from fastapi import FastAPI

from benchmarks.null_servers.loop_lag import LoopLag
from formats.images import encode
from service.http.native.schemas import GeneratedImage, GenerateResponse, Timing
from service.requests.generate_request import GenerateRequest

PICTURE = base64.b64encode(encode(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8), "png")).decode()
TIMING = Timing(images_ahead=0, predicted_wait_s=0, wait_s=0, predicted_finish_s=0, finish_s=0)

app = FastAPI()
LoopLag().install(app)


@app.get("/readyz")
async def readyz() -> None:
    """Be ready."""


@app.post("/v1/generate")
async def generate(body: GenerateRequest) -> GenerateResponse:
    """Answer with the picture."""
    image = GeneratedImage(
        b64_json=PICTURE,
        class_=None,
        class_index=None,
        seed=body.seed or 0,
        image_index=0,
        steps=body.steps or 0,
        queue_ms=0,
        compute_ms=0,
    )
    return GenerateResponse(model="null", images=[image] * (body.n or 1), numerics_id="null", timing=TIMING)


if __name__ == "__main__":
    uvicorn.run(app, port=int(sys.argv[1]), http="h11", loop="asyncio", access_log=False, log_level="warning")
