"""What goes over the wire in the Open Inference Protocol (KServe v2), with Triton's extensions."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr

from service.http.kserve.tensors import Datatype, InputTensor, OutputTensor
from service.requests.request_body import RequestBody

OutputName = Literal["images", "seed", "image_index", "class_index"]


class InferParameters(RequestBody):
    """Parameters of a request, as Triton names them."""

    binary_data_output: StrictBool = Field(
        default=False, description="Whether outputs come as bytes behind the JSON object, unless they say otherwise."
    )
    priority: Annotated[StrictInt, Field(ge=0)] = Field(
        default=0, description="0 and 1: interactive; from 2: batch work, which takes what interactive work leaves."
    )
    timeout: Annotated[StrictInt, Field(ge=0)] = Field(
        default=0,
        description="Microseconds within which all images are wanted; refused at once if that is predicted to fail. "
        "0: whenever.",
    )


class RequestedOutputParameters(RequestBody):
    """Parameters of a requested output."""

    binary_data: StrictBool | None = Field(default=None, description="Absent: as `binary_data_output` says.")


class RequestedOutput(RequestBody):
    """An output that is wanted."""

    name: OutputName
    parameters: RequestedOutputParameters = RequestedOutputParameters()


class InferRequest(RequestBody):
    """A request for images, as tensors. All inputs are optional; GET /v2/models/{model} lists them."""

    id: Annotated[StrictStr, Field(max_length=200)] | None = Field(default=None, description="Comes back as it is.")
    parameters: InferParameters = InferParameters()
    inputs: Annotated[list[InputTensor], Field(max_length=32)]
    outputs: Annotated[list[RequestedOutput], Field(max_length=32)] | None = Field(
        default=None, description="Absent or empty: all."
    )


class InferResponse(BaseModel):
    """Images and what they were made from, as tensors."""

    model_config = ConfigDict(protected_namespaces=())

    model_name: str
    model_version: str = Field(description="The numerics_id: equal ones give equal pixels for equal requests.")
    id: str | None = None
    outputs: list[OutputTensor]


class TensorMetadata(BaseModel):
    """An input or output of a model."""

    name: str
    datatype: Datatype
    shape: list[int] = Field(description="-1: any number, the same for all of them: the images of a request.")


class ModelMetadata(BaseModel):
    """A model as its clients see it."""

    name: str
    versions: list[str] = Field(description="One: the numerics_id. Asking for it by path pins the pixels.")
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class ConfigTensor(BaseModel):
    """An input or output in Triton's model configuration."""

    name: str
    data_type: str
    dims: list[int]
    optional: bool | None = None


class ModelConfig(BaseModel):
    """What a Triton server would tell of a model's configuration."""

    name: str
    platform: str
    backend: str
    max_batch_size: int = Field(description="0: shapes are what they say, no dimension is added for batches.")
    input: list[ConfigTensor]
    output: list[ConfigTensor]


class ServerMetadata(BaseModel):
    """The server as its clients see it."""

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
    """How often something happened, and how long it took in all."""

    count: int
    ns: int


class InferenceStats(BaseModel):
    """What became of images, and where their time went; each image counts as one inference."""

    success: Duration
    fail: Duration
    queue: Duration
    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration
    cache_hit: Duration
    cache_miss: Duration


class BatchStats(BaseModel):
    """Network calls with so many rows, padding included."""

    batch_size: int
    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration


class ModelStats(BaseModel):
    """Activity of a model since the process began."""

    name: str
    version: str
    last_inference: int = Field(description="When an image was last done; milliseconds since 1970, 0 for never.")
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
