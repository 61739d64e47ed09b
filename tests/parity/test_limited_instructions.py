"""Check that the limits set by `make test-avx2` apply to the kernels; without them, these tests are skipped."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from formats.artifact import MODEL_FILE
from service.backends.openvino_core import openvino_core
from service.backends.openvino_graph import compile_settings
from tests.exports import Exports

pytestmark = pytest.mark.skipif(os.environ.get("ONEDNN_MAX_CPU_ISA") != "AVX2", reason="make test-avx2 runs it")

UNLIMITED = {"DepthToSpace", "Reduce"}
"""Operations whose kernels OpenVINO chooses by its own detection of the processor."""


def kernels(graph: Path) -> dict[str, set[str]]:
    """Compile a graph for a row in OpenVINO; return its kernels by operation, e.g. jit_avx2_f32."""
    network = openvino_core().read_model(graph)
    network.reshape({node: [1, *(n.get_length() for n in list(node.partial_shape)[1:])] for node in network.inputs})
    found: dict[str, set[str]] = {}
    compiled = openvino_core().compile_model(network, "CPU", compile_settings("fp32", 1, 1))
    for node in compiled.get_runtime_model().get_ops():
        info = node.get_rt_info()
        found.setdefault(info["layerType"].astype(str), set()).add(info["primitiveType"].astype(str))
    return found


def test_openvino_computes_with_avx2(exports: Exports) -> None:
    found = kernels(exports.bundled() / MODEL_FILE)
    assert "brgconv_avx2_f32" in found["Convolution"]
    beyond = {operation for operation, names in found.items() if any("avx512" in name for name in names)}
    assert beyond <= UNLIMITED


def test_pytorch_computes_with_avx2(capfd: pytest.CaptureFixture[str]) -> None:
    assert torch.backends.cpu.get_cpu_capability() == "AVX2"
    x, weight = torch.ones(4, 32, 32, 32), torch.ones(32, 32, 3, 3)
    with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):  # type: ignore[no-untyped-call]
        torch.nn.functional.conv2d(x, weight, padding=1)
        ctypes.CDLL(None).fflush(None)
    calls = [line for line in capfd.readouterr().out.splitlines() if ",convolution," in line]
    assert calls
    assert all("avx2" in line for line in calls)


def test_numpy_computes_with_avx2() -> None:
    found = np.show_config(mode="dicts")["SIMD Extensions"]["found"]
    assert not [name for name in found if "512" in name or name == "X86_V4"]
