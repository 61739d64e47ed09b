"""The bodies of POST /v1/encode and POST /v1/denoise, and their conversion to complete requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr, WrapValidator

from diffusion.chains import build_chain
from diffusion.config import CheckpointConfig
from diffusion.quoting import quoted
from formats.given_shapes import Fit
from service.engine.request import GenerationRequest, GivenArrays, ImageParams, PlanKey, Priority
from service.errors import InvalidRequest
from service.models.served_model import ServedModel
from service.requests.generate_request import (
    DEFAULT_STEPS,
    MAX_CFG_SCALE,
    MAX_DEADLINE_S,
    MAX_IMAGES,
    ClassSpec,
    PriorityName,
    one_error,
)
from service.requests.given import begun_with, given_images, reading, shape_of, with_cond
from service.requests.request_body import RequestBody
from service.requests.source import File

Timestep = Annotated[StrictInt, Field(ge=0)]
GREY_PNG = "iVBORw0KGgoAAAANSUhEUgAAAAIAAAACCAAAAABX3VL4AAAADklEQVR42mM8wcDEwAAAA/oAzJ1i2jMAAAAASUVORK5CYII="
"""A grey picture of 2x2 pixels, for the documentation."""
ZERO_NPZ = (
    "UEsDBBQAAAAIAAAAIQDuR/SoVwAAAIAIAAAFAAAAeC5ucHmb7BfqGxDJyFDGUK2eklqcXKRupaBuk2akrqOgnpZfVFKUmBefX5SSChJ3S8wpTgWK"
    "F2ckFqQC+RrGRjoKIGyoqaNQq0AO4GIYBaNgFIyCUTAKRsGIAwBQSwECFAMUAAAACAAAACEA7kf0qFcAAACACAAABQAAAAAAAAAAAAAAgAEAAAAA"
    "eC5ucHlQSwUGAAAAAAEAAQAzAAAAegAAAAAA"
)
"""Zeros [32, 32, 1], float16, for the documentation: of the bundled model's shape."""


class ArrayOptions(RequestBody):
    """Fields that both requests have."""

    model: StrictStr | None = Field(default=None, description="Name of a served model; default: the first.")
    class_: Annotated[
        ClassSpec | Annotated[list[ClassSpec], Field(min_length=1, max_length=MAX_IMAGES)] | None,
        WrapValidator(one_error),
    ] = Field(
        default=None,
        alias="class",
        description="Class by name or index, or a list with one per array; absent: the null class, if there is one.",
    )
    cond: File | None = Field(
        default=None, description="Conditioning image, as for `/v1/generate`; one, or one per array."
    )
    cfg_scale: Annotated[StrictFloat | StrictInt, Field(ge=0, le=MAX_CFG_SCALE, allow_inf_nan=False)] = Field(
        default=1, description="Classifier-free guidance scale; 1 = off, the default."
    )
    priority: PriorityName = Field(default="interactive", description="As for `/v1/generate`.")
    deadline_s: Annotated[StrictFloat | StrictInt, Field(gt=0, le=MAX_DEADLINE_S, allow_inf_nan=False)] | None = Field(
        default=None, description="As for `/v1/generate`."
    )


class EncodeRequest(ArrayOptions):
    """A request for latents of images."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"image": GREY_PNG, "fit": "resize", "steps": 50}]})

    image: File = Field(
        description="Image to encode: PNG, WebP, JPEG, npy or npz, in base64. An array of shape "
        "[n, height, width, channels] holds several."
    )
    fit: Fit | None = Field(
        default=None,
        description="Changes an `image` and `cond` of another shape: `crop`, `pad` or `resize`; default: refused.",
    )
    steps: Annotated[StrictInt, Field(ge=2)] | None = Field(
        default=None, description=f"Respaced timesteps, 2..T of the model; default {DEFAULT_STEPS}."
    )
    end_timestep: Timestep | None = Field(
        default=None,
        description="t of the training chain to end at; the nearest step that is taken. Default: the noisiest one.",
    )
    clip: StrictBool = Field(default=True, description="Whether the predicted image is clamped in each step.")
    format: Literal["npz", "npy"] = Field(default="npz", description="`npz` (array `arr_0`) or `npy`.")


class DenoiseRequest(ArrayOptions):
    """A request for one call of the network."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"x_t": ZERO_NPZ, "timestep": 500}]})

    x_t: File = Field(
        description="Noisy images: float npy or npz in base64, [height, width, channels] or [n, height, width, "
        "channels], in the units of the network."
    )
    timestep: Annotated[Timestep | Annotated[list[Timestep], Field(min_length=1, max_length=MAX_IMAGES)], Field()] = (
        Field(description="t of the training chain, 0..T-1, or a list with one per array.")
    )
    fit: Fit | None = Field(
        default=None, description="Changes a `cond` of another shape: `crop`, `pad` or `resize`; default: refused."
    )


def read_encoded(body: EncodeRequest, config: CheckpointConfig) -> tuple[GivenArrays, ...]:
    """Read the images of a request. Slow: call it in the `EncodingPool`.

    Raises:
        InvalidRequest: the file cannot be read, or has another shape.
    """
    shape = shape_of(config.model)
    images = reading("image", lambda: body.image.images(shape, most=MAX_IMAGES, fit=body.fit))
    return with_cond(given_images(images, None, config), body.cond, config, body.fit)


def read_noisy(body: DenoiseRequest, config: CheckpointConfig) -> tuple[GivenArrays, ...]:
    """Read the arrays of a request. Slow: call it in the `EncodingPool`.

    Raises:
        InvalidRequest: the file cannot be read, or has another shape; or there is nothing to fit.
    """
    if body.fit is not None and body.cond is None:
        raise InvalidRequest("fit", "is valid only with `cond`")
    shape = shape_of(config.model)
    arrays = reading("x_t", lambda: body.x_t.values(shape, most=MAX_IMAGES))
    return with_cond(begun_with("x_t", arrays.transpose(0, 3, 1, 2)), body.cond, config, body.fit)


def complete_arrays(
    body: EncodeRequest | DenoiseRequest,
    given: Sequence[GivenArrays],
    model: ServedModel,
    request_id: str,
    max_row_steps: int,
    client: str = "",
) -> GenerationRequest:
    """Fill in defaults and check the constraints that depend on the model.

    Args:
        body: of the request.
        given: its arrays, at least one.
        model: that it names.
        request_id: new id.
        max_row_steps: most work.
        client: of the request.

    Raises:
        InvalidRequest: a constraint is violated; the message names field, rule and allowed values.
    """
    config, count = model.config, len(given)
    if body.cfg_scale != 1 and not config.model.null_class:
        raise InvalidRequest("cfg_scale", f"must be 1: the model has no null class; got {body.cfg_scale:g}")
    cfg_scale = float(np.float32(body.cfg_scale))
    classes = _classes(body, model, count)
    plans = _encode_plans(body, config, count) if isinstance(body, EncodeRequest) else _raw_plans(body, config, count)
    images = tuple(
        ImageParams(
            plan=plan,
            num_steps=build_chain(config.diffusion, plan).num_steps,
            seed=0,
            image_index=k,
            class_index=class_index,
            cfg_scale=cfg_scale,
            given=given[k],
            output="values",
        )
        for k, (plan, class_index) in enumerate(zip(plans, classes, strict=True))
    )
    request = GenerationRequest(
        request_id=request_id,
        model=model.engine_id,
        images=images,
        client=client,
        priority=Priority(body.priority),
        deadline_s=None if body.deadline_s is None else float(body.deadline_s),
    )
    if request.row_steps > max_row_steps:
        raise InvalidRequest(
            "steps" if isinstance(body, EncodeRequest) else "x_t",
            f"arrays x steps{' x 2 for guidance' if images[0].rows == 2 else ''} must be at most {max_row_steps} per "
            f"request; got {request.row_steps}",
        )
    return request


def _encode_plans(body: EncodeRequest, config: CheckpointConfig, count: int) -> list[PlanKey]:
    timesteps = config.diffusion.num_timesteps
    steps = min(DEFAULT_STEPS, timesteps) if body.steps is None else body.steps
    if steps > timesteps:
        raise InvalidRequest("steps", f"must be 2..{timesteps}, the model's timesteps; got {steps}")
    _check_timestep("end_timestep", body.end_timestep, timesteps)
    return [PlanKey(kind="encode", spec=str(steps), timestep=body.end_timestep, clip=body.clip)] * count


def _raw_plans(body: DenoiseRequest, config: CheckpointConfig, count: int) -> list[PlanKey]:
    wanted = body.timestep if isinstance(body.timestep, list) else [body.timestep] * count
    if len(wanted) != count:
        raise InvalidRequest("timestep", f"must be one number or a list of {count}, one per array; got {len(wanted)}")
    for timestep in wanted:
        _check_timestep("timestep", timestep, config.diffusion.num_timesteps)
    return [PlanKey(kind="denoise", timestep=timestep) for timestep in wanted]


def _check_timestep(field: str, timestep: int | None, num_timesteps: int) -> None:
    if timestep is not None and timestep >= num_timesteps:
        raise InvalidRequest(field, f"must be 0..{num_timesteps - 1}; got {timestep}")


def _classes(body: ArrayOptions, model: ServedModel, count: int) -> list[int | None]:
    wanted: list[Any] = body.class_ if isinstance(body.class_, list) else [body.class_] * count
    if len(wanted) != count:
        raise InvalidRequest("class", f"must be one class or a list of {count}, one per array; got {len(wanted)}")
    return [_class_index(spec, model) for spec in wanted]


def _class_index(spec: int | str | None, model: ServedModel) -> int | None:
    network, classes = model.config.model, model.classes
    if network.num_classes is None or classes is None:
        if spec is not None:
            raise InvalidRequest("class", f"must be absent: model {quoted(model.name)} is unconditional")
        return None
    if spec is None:
        if not network.null_class:
            raise InvalidRequest("class", f"is required: model {quoted(model.name)} has no null class")
        return network.num_classes
    if isinstance(spec, str):
        return classes.find(spec)
    if spec >= network.num_classes:
        raise InvalidRequest("class", f"index must be 0..{network.num_classes - 1}; got {spec}")
    return spec
