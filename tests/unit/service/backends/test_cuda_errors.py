"""Kinds of errors of a CUDA device; the errors are made here, as they can be raised on a GPU only."""

from __future__ import annotations

import pytest
import torch

from service.backends.base import FailureKind
from service.backends.cuda_errors import OUT_OF_MEMORY_CODE, cuda_failure_kind


def accelerator_error(code: int) -> Exception:
    error = torch.AcceleratorError("CUDA error: as in the runtime")
    vars(error)["error_code"] = code
    return error


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), FailureKind.OUT_OF_MEMORY),
        (accelerator_error(OUT_OF_MEMORY_CODE), FailureKind.OUT_OF_MEMORY),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), FailureKind.OUT_OF_MEMORY),
        (MemoryError(), FailureKind.OUT_OF_MEMORY),
        (accelerator_error(700), FailureKind.DEVICE),
        (torch.AcceleratorError("CUDA error: unspecified launch failure"), FailureKind.DEVICE),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), FailureKind.DEVICE),
        (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), FailureKind.DEVICE),
        (RuntimeError("TensorRT did not run the engine for batches of 4"), FailureKind.DEVICE),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), FailureKind.ROWS),
        (TypeError("unsupported operand"), FailureKind.ROWS),
        (ValueError("CUDA error: the text of a Python error proves nothing"), FailureKind.ROWS),
    ],
)
def test_kind(error: Exception, kind: FailureKind) -> None:
    assert cuda_failure_kind(error) is kind
