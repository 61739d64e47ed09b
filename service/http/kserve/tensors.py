"""Tensors of the Open Inference Protocol on the wire: in JSON, or as bytes behind it (the binary tensor extension).

A body is a JSON object, followed by the bytes of the tensors that have `binary_data_size`, in order; the header
Inference-Header-Content-Length gives the length of the object. All sizes in a body are checked.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, Field, StrictInt, StrictStr, WithJsonSchema
from pydantic_core import to_json

from diffusion.quoting import quoted
from service.errors import InvalidRequest
from service.requests.generate_request import MAX_IMAGES
from service.requests.request_body import RequestBody, classes_in

LENGTH_HEADER = "Inference-Header-Content-Length"
MAX_ELEMENTS = MAX_IMAGES
"""Maximum number of elements of an input that is not an array: one per image."""
MAX_LENGTH = 1 << 16
"""Maximum length of an axis of an array."""

PIECE = 16384
"""Elements converted to JSON at once; this blocks other threads for about a millisecond."""

Datatype = Literal["BYTES", "INT64", "FP32", "UINT8"]
Element = int | float | str
NUMPY_TYPES: Mapping[str, npt.DTypeLike] = {"INT64": "<i8", "FP32": "<f4", "UINT8": "u1"}


def datatype_of(annotation: Any) -> Datatype:
    """Return the datatype of a tensor that holds values of an annotation: of numbers the widest, else BYTES."""
    kinds = set(classes_in(annotation))
    if float in kinds:
        return "FP32"
    return "INT64" if int in kinds else "BYTES"


class InputParameters(RequestBody):
    """Parameters of an input tensor."""

    binary_data_size: Annotated[StrictInt, Field(ge=0)] | None = Field(
        default=None, description="Number of bytes of this tensor behind the JSON object; absent: it has `data`."
    )


JsonElement = Annotated[Any, WithJsonSchema({"anyOf": [{"type": kind} for kind in ("number", "string", "boolean")]})]
"""Checked by `read_tensors`: what an element must be depends on the tensor's datatype."""


class InputTensor(RequestBody):
    """An input tensor; `data` is absent if the elements are behind the JSON object."""

    name: Annotated[StrictStr, Field(max_length=200)]
    shape: Annotated[list[Annotated[StrictInt, Field(ge=0, le=MAX_LENGTH)]], Field(min_length=1, max_length=4)]
    datatype: StrictStr
    parameters: InputParameters = InputParameters()
    data: list[JsonElement] | None = Field(
        default=None, description="All elements in one list; the last axis varies fastest."
    )


class OutputTensor(BaseModel):
    """An output tensor; its elements are in `data`, or behind the JSON object if `parameters` specify it."""

    name: str
    shape: list[int]
    datatype: Datatype
    parameters: dict[str, int] | None = None
    data: list[Any] | None = None


def split_body(body: bytes, header_length: str | None) -> tuple[bytes, bytes]:
    """Return the JSON object of a body, and the bytes behind it.

    Args:
        body: all of it.
        header_length: value of Inference-Header-Content-Length; None: the body is the object alone.

    Raises:
        InvalidRequest: the header is not a length, or exceeds the body.
    """
    if header_length is None:
        return body, b""
    is_length = header_length.isascii() and header_length.isdigit() and len(header_length) < 10
    if not is_length or int(header_length) > len(body):
        raise InvalidRequest(LENGTH_HEADER, f"must be the JSON object's part of the body's {len(body)} bytes")
    return body[: int(header_length)], body[int(header_length) :]


def read_tensors(
    tensors: Sequence[InputTensor], binary: bytes, arrays: Collection[str] = ()
) -> dict[str, list[Element] | npt.NDArray[Any]]:
    """Return the content of each tensor, by its name.

    Args:
        tensors: as the JSON object describes them; datatypes have been checked.
        binary: the bytes behind the object.
        arrays: names of those that are returned as arrays; all others have one axis, and their elements are returned.

    Raises:
        InvalidRequest: two tensors have one name, lengths do not agree, or bytes are invalid for their datatype.
    """
    contents: dict[str, list[Element] | npt.NDArray[Any]] = {}
    offset = 0
    for tensor in tensors:
        is_array = tensor.name in arrays
        if not is_array and (len(tensor.shape) != 1 or tensor.shape[0] > MAX_ELEMENTS):
            raise InvalidRequest(tensor.name, f"shape must be [n], n at most {MAX_ELEMENTS}; got {tensor.shape}")
        if tensor.name in contents:
            raise InvalidRequest(tensor.name, "is given twice")
        size = tensor.parameters.binary_data_size
        if (size is None) == (tensor.data is None):
            raise InvalidRequest(tensor.name, "must have either `data` or the parameter `binary_data_size`")
        if size is None:
            elements = _from_json(tensor)
            contents[tensor.name] = _array_of(tensor, elements) if is_array else elements
            continue
        if size > len(binary) - offset:
            raise InvalidRequest(
                tensor.name, f"binary_data_size is {size}, but only {len(binary) - offset} bytes are left in the body"
            )
        content = binary[offset : offset + size]
        contents[tensor.name] = _array_from_bytes(tensor, content) if is_array else _from_bytes(tensor, content)
        offset += size
    if offset != len(binary):
        raise InvalidRequest("inputs", f"{len(binary) - offset} bytes of the body do not belong to any tensor")
    return contents


def with_member(described: BaseModel, name: str, value: bytes) -> bytes:
    """Return a model as a JSON object with one member added or replaced.

    Args:
        described: the model; has a field before that member.
        name: of the member.
        value: of the member, as JSON.
    """
    others = described.model_dump_json(exclude={name}, exclude_none=True).encode().removesuffix(b"}")
    return b"".join([others, b',"', name.encode(), b'":', value, b"}"])


def write_tensors(arrays: Mapping[str, npt.NDArray[Any]], as_bytes: Mapping[str, bool]) -> tuple[bytes, bytes]:
    """Return output tensors as a JSON list of `OutputTensor`, and the bytes behind the JSON object.

    Args:
        arrays: by name, in order; int64, float32 or uint8.
        as_bytes: by name, whether the elements are bytes behind the object.
    """
    tensors, behind = [], []
    for name, array in arrays.items():
        datatype = _DATATYPES[array.dtype]
        tensor = OutputTensor(name=name, shape=list(array.shape), datatype=datatype)
        if as_bytes[name]:
            content = np.ascontiguousarray(array, NUMPY_TYPES[datatype]).tobytes()
            tensor.parameters = {"binary_data_size": len(content)}
            behind.append(content)
            tensors.append(tensor.model_dump_json(exclude_none=True).encode())
        else:
            tensors.append(with_member(tensor, "data", _as_json(array)))
    return _listed(tensors), b"".join(behind)


def _as_json(array: npt.NDArray[Any]) -> bytes:
    """Return elements as a JSON list. Made in pieces, so that other threads can run in between."""
    flat = array.ravel()
    pieces = (to_json(flat[begin : begin + PIECE].tolist())[1:-1] for begin in range(0, flat.size, PIECE))
    return _listed(pieces)


def _listed(items: Iterable[bytes]) -> bytes:
    """Return a JSON list. Made by `join`, during which other threads can run."""
    return b"".join([b"[", b",".join(items), b"]"])


_DATATYPES: Mapping[np.dtype[Any], Datatype] = {
    np.dtype(np.int64): "INT64",
    np.dtype(np.float32): "FP32",
    np.dtype(np.uint8): "UINT8",
}


def _from_json(tensor: InputTensor) -> list[Element]:
    data = tensor.data or []
    _check_count(tensor, len(data))
    wanted: tuple[type, ...] = {"BYTES": (str,), "INT64": (int,)}.get(tensor.datatype, (int, float))
    for element in data:
        if isinstance(element, bool) or not isinstance(element, wanted):
            kind = {"BYTES": "strings", "INT64": "integers"}.get(tensor.datatype, "numbers")
            raise InvalidRequest(
                tensor.name, f"data must hold {tensor.datatype} elements, {kind} in JSON; got {quoted(element)}"
            )
    return data


def _array_of(tensor: InputTensor, elements: list[Element]) -> npt.NDArray[Any]:
    """Return elements in JSON as an array: uint8, or float64, in which the range of float32 is checked later."""
    if tensor.datatype == "UINT8":
        array: npt.NDArray[Any] = np.array(elements)
        if array.size and (array.dtype.kind != "i" or array.min() < 0 or array.max() > 255):
            raise InvalidRequest(tensor.name, "data must hold UINT8 elements, integers in 0..255")
        return array.astype(np.uint8).reshape(tensor.shape)
    try:
        return np.array(elements, np.float64).reshape(tensor.shape)
    except OverflowError as error:  # an integer of many digits
        raise InvalidRequest(tensor.name, "data must hold FP32 elements, numbers in the range of float32") from error


def _from_bytes(tensor: InputTensor, content: bytes) -> list[Element]:
    if tensor.datatype == "BYTES":
        strings = _strings(tensor.name, content)
        _check_count(tensor, len(strings))
        return list(strings)
    array = _array_from_bytes(tensor, content)
    if tensor.datatype == "FP32":
        # The shortest decimal of this float32, such as 0.3: what the client wrote, and what JSON would give
        return [float(str(element)) for element in array]
    return array.tolist()


def _array_from_bytes(tensor: InputTensor, content: bytes) -> npt.NDArray[Any]:
    size = np.dtype(NUMPY_TYPES[tensor.datatype]).itemsize
    if len(content) != size * math.prod(tensor.shape):
        raise InvalidRequest(
            tensor.name,
            f"shape {tensor.shape} of {tensor.datatype} takes {size * math.prod(tensor.shape)} bytes; "
            f"binary_data_size is {len(content)}",
        )
    return np.frombuffer(content, NUMPY_TYPES[tensor.datatype]).reshape(tensor.shape)


def _strings(name: str, content: bytes) -> list[str]:
    """Read strings, each after its length in four bytes."""
    strings: list[str] = []
    offset = 0
    while offset < len(content):
        if len(strings) == MAX_ELEMENTS:
            raise InvalidRequest(name, f"holds more than {MAX_ELEMENTS} strings")
        begin = offset + 4
        length = struct.unpack_from("<I", content, offset)[0] if begin <= len(content) else len(content)
        if length > len(content) - begin:
            raise InvalidRequest(name, "a string's length reaches beyond the tensor's bytes")
        try:
            strings.append(content[begin : begin + length].decode())
        except UnicodeDecodeError as error:
            raise InvalidRequest(name, "strings must be UTF-8") from error
        offset = begin + length
    return strings


def _check_count(tensor: InputTensor, count: int) -> None:
    if count != math.prod(tensor.shape):
        raise InvalidRequest(tensor.name, f"shape {tensor.shape} has {math.prod(tensor.shape)} elements; got {count}")
