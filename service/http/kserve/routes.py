"""Routes of the Open Inference Protocol (KServe v2) over HTTP, as used by Triton's clients."""

from __future__ import annotations

from functools import partial
from importlib.metadata import version as version_of
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from fastapi import APIRouter, Depends, Path, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from pydantic_core import to_json
from starlette.responses import Response

from diffusion.quoting import in_words, quoted
from service.errors import InvalidRequest, UnknownModel
from service.http.broken_rules import dotted, message_of
from service.http.door.json_body import read_json
from service.http.execution import Finished, answer_when_done, prepare
from service.http.health import refusal_if_dead, refusal_if_not_ready
from service.http.interfaces import KserveRoute
from service.http.kserve.schemas import (
    ConfigParameter,
    ConfigTensor,
    InferRequest,
    InferResponse,
    KserveError,
    Live,
    ModelConfig,
    ModelMetadata,
    ModelReady,
    ModelStatsList,
    Ready,
    ServerMetadata,
    TensorMetadata,
)
from service.http.kserve.stats import model_stats
from service.http.kserve.tensors import (
    LENGTH_HEADER,
    Datatype,
    Element,
    datatype_of,
    read_tensors,
    split_body,
    with_member,
    write_tensors,
)
from service.http.native.info import samplers
from service.http.openapi import inlined
from service.http.state import ServiceState, service_state
from service.models.served_model import ServedModel, find_model
from service.requests.generate_request import GenerateRequest, ResampleOptions, SamplingOptions, UpsampleOptions
from service.requests.given import cond_file_shape, shape_of
from service.requests.results import eight_bits_of
from service.requests.source import ArraySource

NOT_INPUTS = frozenset({"model", "priority", "deadline_s", "upsample"})
"""Common options that are not tensors here: the path names the model, `upsample` is a tensor per field, the others are
parameters."""
OF_UPSAMPLER = "upsample."
"""Begins the names of inputs that are fields of `upsample`; only cascades have them."""
INPUTS: dict[str, Datatype] = {
    "class": "BYTES",
    "class_index": "INT64",
    "n": "INT64",
    **{
        name: datatype_of(field.annotation)
        for name, field in SamplingOptions.model_fields.items()
        if name not in NOT_INPUTS
    },
    "strength": "FP32",
    "start_timestep": "INT64",
    "resample": "INT64",
    "fit": "BYTES",
    **{OF_UPSAMPLER + name: datatype_of(field.annotation) for name, field in UpsampleOptions.model_fields.items()},
}
"""Input tensors: fields of a native request, all optional; `class_index` is `class` as a number."""
ONE_PER_IMAGE = frozenset({"class", "class_index"})
LENGTHS = {"resample": len(ResampleOptions.model_fields)}
"""Lengths of inputs that are neither of one element nor of one per image: `times` and `jump`."""
ARRAYS: dict[str, tuple[Datatype, ...]] = {
    "image": ("UINT8", "FP32"),
    "mask": ("FP32", "UINT8"),
    "latent": ("FP32",),
    "cond": ("UINT8", "FP32"),
}
"""Given arrays, and their datatypes, of which metadata states the first."""
VALUES = "values"
"""Output that has the images as float32, as `dtype` of a native request; only if it is requested."""
EXTENSIONS = ["binary_tensor_data", "model_configuration", "schedule_policy", "statistics"]
TRITON_TYPES: dict[Datatype, str] = {
    "BYTES": "TYPE_STRING",
    "INT64": "TYPE_INT64",
    "FP32": "TYPE_FP32",
    "UINT8": "TYPE_UINT8",
}
BATCH_PRIORITY = 2
"""Triton's priorities count from 1, the highest."""
NO_CLASS = -1
"""`class_index` of an image without a class, if only the model's classifier has classes and did not guide it."""

State = Annotated[ServiceState, Depends(service_state)]


async def served_model(model: Annotated[str, Path(description="Name of a served model.")], state: State) -> ServedModel:
    """Return the model that a path names."""
    return find_model(state.models, model)


Model = Annotated[ServedModel, Depends(served_model)]


async def check_version(model: Model, version: Annotated[str, Path(description="The model's numerics_id.")]) -> None:
    """Raise UnknownModel for versions that the model does not have."""
    _refuse_other_version(model, version)


def _refuse_other_version(model: ServedModel, version: str) -> None:
    if version != model.numerics_id:
        raise UnknownModel(f"{model.name}, version {version}", [f"{model.name}, version {model.numerics_id}"])


_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": KserveError, "description": "The request is wrong, or too much is in flight (429)"},
    "5XX": {"model": KserveError, "description": "Not ready (503), an image or the engine failed, or it took too long"},
}
_BINARY = {"schema": {"type": "string", "format": "binary"}}
_EXAMPLE = {
    "inputs": [
        {"name": "class_index", "shape": [2], "datatype": "INT64", "data": [0, 1]},
        {"name": "steps", "shape": [1], "datatype": "INT64", "data": [50]},
        {"name": "seed", "shape": [1], "datatype": "INT64", "data": [7]},
    ]
}
_INFER_BODY = {
    "required": True,
    "content": {
        "application/json": {"schema": inlined(InferRequest), "example": _EXAMPLE},
        "application/octet-stream": _BINARY,
    },
}

server = APIRouter(prefix="/v2", tags=["kserve"], responses=_ERRORS, route_class=KserveRoute)
of_model = APIRouter(route_class=KserveRoute)


@server.get("")
async def server_metadata() -> ServerMetadata:
    """Return the server's name, version and protocol extensions."""
    return ServerMetadata(name="iddpm", version=version_of("iddpm"), extensions=EXTENSIONS)


@server.get("/health/live", response_model=Live)
async def live(state: State) -> Live | Response:
    """Report whether the process is alive; 503 after the engine has stopped with an error: restart the process."""
    return refusal_if_dead(state.engine) or Live(live=True)


@server.get("/health/ready", response_model=Ready)
async def ready(state: State) -> Ready | Response:
    """Report whether requests are accepted: from the end of warm-up until shutdown begins."""
    return refusal_if_not_ready(state.engine) or Ready(ready=True)


@server.get("/models/stats")
async def all_stats(state: State) -> ModelStatsList:
    """Return statistics of all models since the process started."""
    return ModelStatsList(model_stats=[model_stats(model, state.engine.activity) for model in state.models.values()])


@of_model.get("")
async def metadata(model: Model) -> ModelMetadata:
    """List a model's inputs and outputs."""
    return ModelMetadata(
        name=model.name,
        versions=[model.numerics_id],
        platform="iddpm",
        inputs=_inputs(model),
        outputs=_outputs(model),
        samplers=samplers(),
    )


@of_model.get("/ready", response_model=ModelReady)
async def model_ready(model: Model, state: State) -> ModelReady | Response:
    """Report whether requests for a model are accepted."""
    return refusal_if_not_ready(state.engine) or ModelReady(name=model.name, ready=True)


@of_model.get("/config", response_model_exclude_none=True)
async def config(model: Model) -> ModelConfig:
    """Return a model's configuration in Triton's format."""
    return ModelConfig(
        name=model.name,
        platform="iddpm",
        backend=model.backend,
        max_batch_size=0,
        input=[
            ConfigTensor(
                name=tensor.name,
                data_type=TRITON_TYPES[tensor.datatype],
                dims=tensor.shape,
                optional=tensor.name != "cond",
            )
            for tensor in _inputs(model)
        ],
        output=[
            ConfigTensor(name=tensor.name, data_type=TRITON_TYPES[tensor.datatype], dims=tensor.shape)
            for tensor in _outputs(model)
        ],
        parameters={"samplers": ConfigParameter(string_value=to_json(samplers()).decode())},
    )


@of_model.get("/stats")
async def stats(model: Model, state: State) -> ModelStatsList:
    """Return statistics of a model since the process started."""
    return ModelStatsList(model_stats=[model_stats(model, state.engine.activity)])


@of_model.post(
    "/infer",
    response_model=InferResponse,
    response_model_exclude_none=True,
    responses={200: {"content": {"application/octet-stream": _BINARY}}},
    openapi_extra={"requestBody": _INFER_BODY},
)
async def infer(model: Model, request: Request, state: State) -> Response:
    """Generate images.

    Elements of tensors are in the JSON object, or behind it as bytes. With bytes, the header
    Inference-Header-Content-Length must give the length of the object.
    """
    content, length = await request.body(), request.headers.get(LENGTH_HEADER)
    while True:
        body, native = await state.encoding.run_if_large(len(content), _read, content, length, model)
        prepared = await prepare(native, request, state)
        if prepared.model is model:
            break
        model = prepared.model  # it was reloaded meanwhile: other outputs may exist
    if "version" in request.path_params:  # the model may have been reloaded meanwhile
        _refuse_other_version(prepared.model, request.path_params["version"])
    answered = await answer_when_done(prepared, request, state, partial(_answer, body))
    return answered.response


server.include_router(of_model, prefix="/models/{model}")
server.include_router(of_model, prefix="/models/{model}/versions/{version}", dependencies=[Depends(check_version)])
router = server


def _inputs(model: ServedModel) -> list[TensorMetadata]:
    """Return the input tensors of a model: `cond` only if it takes one, which is then required; of a cascade, those of
    its upsampler too."""
    height, width, channels = shape_of(model.config.model)
    shapes = {"image": [height, width, channels], "mask": [height, width], "latent": [height, width, channels]}
    if (cond := cond_file_shape(model.config.model)) is not None:
        shapes["cond"] = [*cond]
    inputs = [
        TensorMetadata(name=name, datatype=datatype, shape=[-1 if name in ONE_PER_IMAGE else LENGTHS.get(name, 1)])
        for name, datatype in INPUTS.items()
        if model.stages is not None or not name.startswith(OF_UPSAMPLER)
    ]
    return inputs + [
        TensorMetadata(name=name, datatype=ARRAYS[name][0], shape=[-1, *shape]) for name, shape in shapes.items()
    ]


def _outputs(model: ServedModel) -> list[TensorMetadata]:
    channels, height, width = model.result_config.model.image_shape
    outputs = [
        TensorMetadata(name="images", datatype="UINT8", shape=[-1, height, width, channels]),
        TensorMetadata(name=VALUES, datatype="FP32", shape=[-1, height, width, channels]),
        TensorMetadata(name="seed", datatype="INT64", shape=[-1]),
        TensorMetadata(name="image_index", datatype="INT64", shape=[-1]),
    ]
    if model.classes is not None:
        outputs.append(TensorMetadata(name="class_index", datatype="INT64", shape=[-1]))
    return outputs


def _read(content: bytes, header_length: str | None, model: ServedModel) -> tuple[InferRequest, GenerateRequest]:
    """Return the request in a body, and the native request for it. Slow for arrays.

    Raises:
        MalformedJson, InvalidRequest, RequestValidationError: the body breaks a rule.
    """
    head, behind = split_body(content, header_length)
    try:
        body = InferRequest.model_validate(read_json(head))
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidRequest(dotted(first["loc"]), message_of(first, InferRequest)) from error
    return body, _generate_request(body, behind, model)


def _generate_request(body: InferRequest, behind: bytes, model: ServedModel) -> GenerateRequest:
    """Return the native request for tensors and parameters."""
    for tensor in body.inputs:
        if tensor.name not in INPUTS and tensor.name not in ARRAYS:
            known = ", ".join([*INPUTS, *ARRAYS])
            raise InvalidRequest("inputs", f"must be among {known}; got {quoted(tensor.name)}")
        datatypes = ARRAYS.get(tensor.name) or (INPUTS[tensor.name],)
        if tensor.datatype not in datatypes:
            wanted = in_words(datatypes)
            raise InvalidRequest(tensor.name, f"datatype must be {wanted}; got {quoted(tensor.datatype)}")
    available = [tensor.name for tensor in _outputs(model)]
    requested = {output.name for output in body.outputs or []}
    if missing := requested.difference(available):
        raise InvalidRequest("outputs", f"must be among {', '.join(available)}; got {', '.join(sorted(missing))}")
    fields: dict[str, Any] = {"model": model.name}
    for name, content in read_tensors(body.inputs, behind, ARRAYS).items():
        owner, _, member = name.partition(".")
        if member:
            fields.setdefault(owner, {})[member] = _value_of(name, content)
        else:
            fields[name] = _value_of(name, content)
    if "class_index" in fields:
        if "class" in fields:
            raise InvalidRequest("class_index", "give either `class` or `class_index`, not both")
        fields["class"] = fields.pop("class_index")
    if body.parameters.timeout:
        fields["deadline_s"] = body.parameters.timeout / 1e6
    fields |= {"clip": body.parameters.clip, "dtype": "float32" if VALUES in requested else "uint8"}
    fields["priority"] = "batch" if body.parameters.priority >= BATCH_PRIORITY else "interactive"
    try:
        return GenerateRequest.model_validate(fields)
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from error


def _value_of(name: str, content: list[Element] | npt.NDArray[Any]) -> Any:
    """Return the value of a native request's field for the content of a tensor."""
    if isinstance(content, np.ndarray):
        return ArraySource(content)
    if name in ONE_PER_IMAGE:
        return content
    length = LENGTHS.get(name, 1)
    if len(content) != length:
        raise InvalidRequest(name, f"shape must be [{length}]; got [{len(content)}]")
    return dict(zip(ResampleOptions.model_fields, content, strict=True)) if name == "resample" else content[0]


def _answer(body: InferRequest, finished: Finished) -> Response:
    accepted = finished.accepted
    params, model = accepted.images, accepted.model
    requested = {output.name for output in body.outputs or []}
    arrays: dict[str, npt.NDArray[Any]] = {}
    if not requested or "images" in requested:
        arrays["images"] = np.stack([eight_bits_of(result) for result in finished.results])
    if VALUES in requested:
        arrays[VALUES] = np.stack([accepted.pixels(result) for result in finished.results])
    arrays |= {
        "seed": np.array([image.seed for image in params], np.int64),
        "image_index": np.array([image.image_index for image in params], np.int64),
    }
    if model.classes is not None:
        indices = [NO_CLASS if image.class_index is None else image.class_index for image in params]
        arrays["class_index"] = np.array(indices, np.int64)
    as_bytes = dict.fromkeys(arrays, body.parameters.binary_data_output)
    if body.outputs:
        wanted = {output.name: output.parameters.binary_data for output in body.outputs}
        arrays = {name: arrays[name] for name in wanted}
        as_bytes = {name: as_bytes[name] if binary is None else binary for name, binary in wanted.items()}
    outputs, behind = write_tensors(arrays, as_bytes)
    response = InferResponse(model_name=model.name, model_version=model.numerics_id, id=body.id, outputs=[])
    head = with_member(response, "outputs", outputs)
    if not any(as_bytes.values()):
        return Response(head, media_type="application/json")
    return Response(head + behind, media_type="application/octet-stream", headers={LENGTH_HEADER: str(len(head))})
