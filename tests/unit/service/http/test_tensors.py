"""Tensors on the wire, valid ones and those of hostile clients."""

from __future__ import annotations

import contextlib
import json
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import InvalidRequest
from service.http.kserve.tensors import PIECE, InputTensor, OutputTensor, read_tensors, split_body, write_tensors


def tensor(
    name: str = "x", datatype: str = "INT64", shape: int | list[int] = 1, size: int | None = None, **more: Any
) -> InputTensor:
    axes = shape if isinstance(shape, list) else [shape]
    parameters = {} if size is None else {"parameters": {"binary_data_size": size}}
    return InputTensor.model_validate({"name": name, "datatype": datatype, "shape": axes, **parameters, **more})


def strings(*texts: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(text)) + text for text in texts)


def test_tensors_are_read_in_order_from_json_and_from_the_bytes_after_it() -> None:
    names, seed, scale = strings(b"Cat", "Ältere".encode()), struct.pack("<q", 2**53 - 1), struct.pack("<f", 0.3)
    tensors = [
        tensor("class", "BYTES", 2, size=len(names)),
        tensor("steps", data=[50]),
        tensor("seed", size=8),
        tensor("scale", "FP32", size=4),
    ]
    expected = {"class": ["Cat", "Ältere"], "steps": [50], "seed": [2**53 - 1], "scale": [0.3]}
    assert read_tensors(tensors, names + seed + scale) == expected


@pytest.mark.parametrize(("body", "header", "parts"), [(b"{}12", "2", (b"{}", b"12")), (b"{}", None, (b"{}", b""))])
def test_the_header_has_the_length_of_the_json_part(
    body: bytes, header: str | None, parts: tuple[bytes, bytes]
) -> None:
    assert split_body(body, header) == parts


@pytest.mark.parametrize("header", ["", "-1", "3", "+1", "1.0", "٢", "1" * 5000, "0x1", " 1"])
def test_a_wrong_length_in_the_header_is_refused(header: str) -> None:
    with pytest.raises(InvalidRequest, match="must be the JSON object's part of the body's 2 bytes"):
        split_body(b"{}", header)


@pytest.mark.parametrize(
    ("tensors", "binary", "message"),
    [
        ([tensor(size=16)], b"8 bytes!", "binary_data_size is 16, but only 8 bytes are left"),
        ([tensor(size=2**62)], b"8 bytes!", "only 8 bytes are left"),
        ([tensor(size=8)], b"9 bytes!!", "inputs: 1 bytes of the body do not belong to any tensor"),
        ([tensor(size=4)], b"four", r"shape \[1\] of INT64 takes 8 bytes; binary_data_size is 4"),
        ([tensor(shape=64, size=8)], b"8 bytes!", r"shape \[64\] of INT64 takes 512 bytes"),
        ([tensor(shape=2, data=[1])], b"", r"shape \[2\] has 2 elements; got 1"),
        ([tensor()], b"", "must have either `data` or the parameter"),
        ([tensor(size=0, data=[1])], b"", "must have either `data` or the parameter"),
        ([tensor(data=[1]), tensor(data=[1])], b"", "is given twice"),
        ([tensor(data=["1"])], b"", 'data must hold INT64 elements, integers in JSON; got "1"'),
        ([tensor(data=[True])], b"", "data must hold INT64 elements, integers in JSON; got true"),
        ([tensor(data=[1.0])], b"", r"data must hold INT64 elements, integers in JSON; got 1\.0"),
        ([tensor(data=[[1]])], b"", r"data must hold INT64 elements, integers in JSON; got \[1\]"),
        ([tensor(datatype="BYTES", data=[1])], b"", "data must hold BYTES elements, strings in JSON; got 1"),
        ([tensor(datatype="BYTES", data=[None])], b"", "data must hold BYTES elements, strings in JSON; got null"),
        ([tensor(datatype="FP32", data=["1"])], b"", 'data must hold FP32 elements, numbers in JSON; got "1"'),
        ([tensor(datatype="BYTES", size=3)], b"\0\0\0", "reaches beyond the tensor's bytes"),
        ([tensor(datatype="BYTES", size=7)], b"\xff\xff\xff\xffabc", "reaches beyond the tensor's bytes"),
        ([tensor(datatype="BYTES", size=5)], b"\1\0\0\0\xff", "must be UTF-8"),
        ([tensor(datatype="BYTES", shape=2, size=5)], strings(b"a"), r"has 2 elements; got 1"),
        ([tensor(datatype="BYTES", size=4000)], bytes(4000), "more than 64 strings"),
        ([tensor(shape=[1, 1], data=[1])], b"", r"shape must be \[n\], n at most 64; got \[1, 1\]"),
        ([tensor(shape=65, data=[1] * 65)], b"", r"shape must be \[n\], n at most 64; got \[65\]"),
        ([tensor("image", "FP32", [2, 2], size=8)], bytes(8), r"shape \[2, 2\] of FP32 takes 16 bytes"),
        ([tensor("image", "FP32", [65536] * 4, size=8)], bytes(8), "takes 73786976294838206464 bytes"),
        ([tensor("image", "FP32", [2], data=[1, None])], b"", "numbers in JSON; got null"),
        ([tensor("image", "FP32", [1], data=[10**400])], b"", "in the range of float32"),
        ([tensor("image", "UINT8", [2], data=[1, 256])], b"", r"integers in 0\.\.255"),
        ([tensor("image", "UINT8", [2], data=[1, -1])], b"", r"integers in 0\.\.255"),
        ([tensor("image", "UINT8", [1], data=[1.5])], b"", r"integers in 0\.\.255"),
    ],
)
def test_tensors_with_wrong_sizes_or_types_are_refused(tensors: list[InputTensor], binary: bytes, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        read_tensors(tensors, binary, {"image"})


def test_arrays_are_read_with_their_shape() -> None:
    sent = np.arange(6, dtype=np.float32).reshape(1, 2, 3)
    for tensors, binary in (
        ([tensor("image", "FP32", [1, 2, 3], size=24)], sent.tobytes()),
        ([tensor("image", "FP32", [1, 2, 3], data=sent.ravel().tolist())], b""),
        ([tensor("image", "UINT8", [1, 2, 3], data=list(range(6)))], b""),
        ([tensor("image", "UINT8", [1, 2, 3], size=6)], bytes(range(6))),
    ):
        (image,) = read_tensors(tensors, binary, {"image"}).values()
        assert isinstance(image, np.ndarray)
        assert image.dtype.kind == ("u" if tensors[0].datatype == "UINT8" else "f")
        assert np.array_equal(image, sent)
    (empty,) = read_tensors([tensor("image", "UINT8", [0, 2], data=[])], b"", {"image"}).values()
    assert isinstance(empty, np.ndarray)
    assert empty.shape == (0, 2)


@given(
    st.lists(
        st.builds(
            tensor,
            name=st.sampled_from("abcd"),
            datatype=st.sampled_from(["BYTES", "INT64", "FP32"]),
            shape=st.integers(0, 64),
            size=st.none() | st.integers(0, 70),
        ),
        max_size=4,
    ),
    st.binary(max_size=100),
)
def test_every_frame_is_read_or_refused(tensors: list[InputTensor], binary: bytes) -> None:
    with contextlib.suppress(InvalidRequest):
        read = read_tensors(tensors, binary)
        assert [len(read[described.name]) for described in tensors] == [described.shape[0] for described in tensors]


def test_a_long_output_written_in_parts_is_the_same_json() -> None:
    pixels = np.arange(2 * PIECE + 3, dtype=np.uint8).reshape(1, -1)
    outputs, behind = write_tensors({"images": pixels, "none": pixels[:0]}, {"images": False, "none": False})
    whole = [
        OutputTensor(name="images", shape=[1, pixels.size], datatype="UINT8", data=pixels.ravel().tolist()),
        OutputTensor(name="none", shape=[0, pixels.size], datatype="UINT8", data=[]),
    ]
    assert outputs.decode() == "[" + ",".join(tensor.model_dump_json(exclude_none=True) for tensor in whole) + "]"
    assert behind == b""


def test_outputs_are_written_as_bytes_or_as_json() -> None:
    arrays = {"images": np.arange(8, dtype=np.uint8).reshape(2, 2, 2, 1), "seed": np.array([3, 4])}
    outputs, behind = write_tensors(arrays, {"images": True, "seed": False})
    assert behind == bytes(range(8))
    assert json.loads(outputs) == [
        {"name": "images", "shape": [2, 2, 2, 1], "datatype": "UINT8", "parameters": {"binary_data_size": 8}},
        {"name": "seed", "shape": [2], "datatype": "INT64", "data": [3, 4]},
    ]
