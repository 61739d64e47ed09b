"""Request and response schemas of the Open Inference Protocol (KServe v2), with Triton's extensions."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr

from service.http.kserve.tensors import Datatype, InputTensor, OutputTensor
from service.http.native.schemas import SamplerInfo
from service.requests.generate_request import MAX_DEADLINE_S
from service.requests.request_body import RequestBody

OutputName = Literal["images", "values", "seed", "image_index", "class_index"]


class InferParameters(RequestBody):
    """Parameters of a request, as Triton names them."""

    binary_data_output: StrictBool = Field(
        default=False, description="Whether outputs are bytes behind the JSON object; each output may override it."
    )
    priority: Annotated[StrictInt, Field(ge=0)] = Field(
        default=0, description="0 and 1: interactive; 2 and above: batch work, which gets what interactive work leaves."
    )
    timeout: Annotated[StrictInt, Field(ge=0, le=int(MAX_DEADLINE_S * 1e6))] = Field(
        default=0,
        description="Deadline for all images, in microseconds; rejected at once if predicted to be missed. "
        "0: whenever.",
    )
    clip: StrictBool = Field(default=True, description="Whether the predicted image is clamped in each step.")


class RequestedOutputParameters(RequestBody):
    """Parameters of a requested output."""

    binary_data: StrictBool | None = Field(default=None, description="Absent: the value of `binary_data_output`.")


class RequestedOutput(RequestBody):
    """A requested output."""

    name: OutputName
    parameters: RequestedOutputParameters = RequestedOutputParameters()


class InferRequest(RequestBody):
    """A request for images, as tensors. All inputs are optional; GET /v2/models/{model} lists them."""

    id: Annotated[StrictStr, Field(max_length=200)] | None = Field(default=None, description="Returned unchanged.")
    parameters: InferParameters = InferParameters()
    inputs: Annotated[list[InputTensor], Field(max_length=32)]
    outputs: Annotated[list[RequestedOutput], Field(max_length=32)] | None = Field(
        default=None,
        description="Absent or empty: all but `values`, the images as float32 in the units of the data.",
    )


class InferResponse(BaseModel):
    """Images and their parameters, as tensors."""

    model_config = ConfigDict(protected_namespaces=())

    model_name: str
    model_version: str = Field(description="The numerics_id: equal ids give equal pixels for equal requests.")
    id: str | None = None
    outputs: list[OutputTensor]


class TensorMetadata(BaseModel):
    """An input or output of a model."""

    name: str
    datatype: Datatype
    shape: list[int] = Field(
        description="-1: the number of images of a request, equal for all such tensors; of given arrays also 1."
    )


class ModelMetadata(BaseModel):
    """Metadata of a model: versions, inputs and outputs."""

    name: str
    versions: list[str] = Field(description="One version: the numerics_id. Naming it in the path pins the pixels.")
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]
    samplers: list[SamplerInfo] = Field(description="Values of the input `sampler`; not part of the protocol.")


class ConfigTensor(BaseModel):
    """An input or output in Triton's model configuration."""

    name: str
    data_type: str
    dims: list[int]
    optional: bool | None = None


class ConfigParameter(BaseModel):
    """A parameter in Triton's model configuration."""

    string_value: str


class ModelConfig(BaseModel):
    """A model's configuration in Triton's format."""

    name: str
    platform: str
    backend: str
    max_batch_size: int = Field(description="0: shapes are complete, without an additional batch dimension.")
    input: list[ConfigTensor]
    output: list[ConfigTensor]
    parameters: dict[str, ConfigParameter] = Field(description="`samplers`: as in the metadata, in JSON.")


class ServerMetadata(BaseModel):
    """Metadata of the server."""

    name: str
    version: str
    extensions: list[str]


class Live(BaseModel):
    """The process is alive."""

    live: bool


class Ready(BaseModel):
    """Requests are accepted."""

    ready: bool


class ModelReady(BaseModel):
    """Requests for this model are accepted."""

    name: str
    ready: bool


class Duration(BaseModel):
    """Number of events and their total duration."""

    count: int
    ns: int


class InferenceStats(BaseModel):
    """Outcomes and durations of images; each image counts as one inference."""

    success: Duration
    fail: Duration
    queue: Duration
    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration
    cache_hit: Duration
    cache_miss: Duration


class BatchStats(BaseModel):
    """Network calls with `batch_size` rows, padding included."""

    batch_size: int
    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration


class ModelStats(BaseModel):
    """Activity of a model since the process started."""

    name: str
    version: str
    last_inference: int = Field(description="When the last image was done, in milliseconds since 1970; 0: none yet.")
    inference_count: int = Field(description="Images done.")
    execution_count: int = Field(description="Network calls.")
    inference_stats: InferenceStats
    batch_stats: list[BatchStats]


class ModelStatsList(BaseModel):
    """Activity of models."""

    model_config = ConfigDict(protected_namespaces=())

    model_stats: list[ModelStats]


class KserveError(BaseModel):
    """An error."""

    error: str
