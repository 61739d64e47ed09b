"""Whether OpenVINO computes in bfloat16 on this processor, for tests that need it."""

from __future__ import annotations

from functools import cache

import numpy as np
import openvino
import pytest
from openvino import opset13

from service.backends.openvino_core import openvino_core


@cache
def why_not_in_openvino() -> str | None:
    """Return why OpenVINO does not compute in bfloat16 here, or None if it does.

    On x86 it needs AVX-512. A limit of instruction sets (`make test-avx2`) makes compiling fail instead.
    """
    x, weights = opset13.parameter([1, 16, 8, 8], np.float32), opset13.constant(np.ones((16, 16, 3, 3), np.float32))
    ones = [1, 1]
    model = openvino.Model([opset13.convolution(x, weights, ones, ones, ones, ones)], [x])
    try:
        compiled = openvino_core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "bf16"})
    except RuntimeError as error:
        return f"OpenVINO cannot compile in bfloat16 here: {str(error).strip().splitlines()[-1]}"
    taken = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    return None if taken == "bf16" else f"OpenVINO computes in {taken} where bfloat16 is asked for"


def need_in_openvino() -> None:
    """Skip a test if OpenVINO does not compute in bfloat16 here."""
    if reason := why_not_in_openvino():
        pytest.skip(reason)
