"""POST /v1/encode and POST /v1/denoise: arrays of the network as files."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from starlette.responses import Response

from diffusion.chains import encoding_end
from service.encoding import MEDIA_TYPES, encode_npy
from service.http.execution import Finished, answer_when_done, prepare_arrays
from service.http.interfaces import NativeRoute
from service.http.native.generate import ERRORS, FILE, State
from service.requests.array_requests import DenoiseRequest, EncodeRequest
from service.requests.results import network_values

router = APIRouter(prefix="/v1", tags=["arrays"], route_class=NativeRoute)

_NPZ, _NPY = MEDIA_TYPES["npz"], MEDIA_TYPES["npy"]


@router.post(
    "/encode",
    response_class=Response,
    responses={200: {"content": {_NPZ: FILE, _NPY: FILE}}, **ERRORS},
)
async def encode(body: EncodeRequest, request: Request, state: State) -> Response:
    """Encode images into latents.

    Deterministic DDIM encoding (arXiv:2010.02502, section 4.3). The answer is float32 [n, height, width, channels] in
    the units of the network: `latent` of `POST /v1/generate` takes it, with sampler `ddim` and the same steps to get
    the image back. The header X-Timestep is the training timestep of the latent, for `start_timestep` there.
    """

    def answer(finished: Finished) -> Response:
        latents = np.stack([network_values(result) for result in finished.results])
        npy = body.format == "npy"
        content = encode_npy(latents) if npy else _npz(arr_0=latents)
        end = encoding_end(finished.accepted.model.config.diffusion, finished.accepted.images[0].plan)
        return _file(content, _NPY if npy else _NPZ, finished, {"X-Timestep": str(end)})

    return await _answered(body, request, state, answer)


@router.post("/denoise", response_class=Response, responses={200: {"content": {_NPZ: FILE}}, **ERRORS})
async def denoise(body: DenoiseRequest, request: Request, state: State) -> Response:
    """Call the network.

    The answer is an npz of float32 arrays [n, height, width, channels]: what the network predicts (`eps` or `x0`, with
    guidance if `cfg_scale` is not 1) and `log_variance`, that of p(x_{t-1} | x_t) in the chain of all timesteps.
    """

    def answer(finished: Finished) -> Response:
        outputs = np.stack([network_values(result) for result in finished.results])
        prediction, log_variance = np.split(outputs, 2, axis=-1)
        named = {finished.accepted.model.config.diffusion.prediction: prediction, "log_variance": log_variance}
        return _file(_npz(**named), _NPZ, finished, {})

    return await _answered(body, request, state, answer)


async def _answered(body: EncodeRequest | DenoiseRequest, request: Request, state: State, answer: Any) -> Response:
    prepared = await prepare_arrays(body, request, state)
    answered = await answer_when_done(prepared, request, state, answer)
    answered.response.headers["Server-Timing"] = answered.server_timing
    return answered.response


def _file(content: bytes, media_type: str, finished: Finished, headers: dict[str, str]) -> Response:
    named = {"X-Numerics-Id": finished.accepted.model.numerics_id, **headers}
    return Response(content, media_type=media_type, headers=named)


def _npz(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()
