"""Classify errors raised on a CUDA device: lack of memory, a lost device, or an error of the call itself."""

from __future__ import annotations

import torch

from service.backends.base import FailureKind, synchronous_failure_kind

OUT_OF_MEMORY_CODE = 2
"""cudaErrorMemoryAllocation."""
OUT_OF_MEMORY_TEXTS = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
DEVICE_TEXTS = ("CUDA error", "CUBLAS_STATUS_", "CUDNN_STATUS_", "CUDA driver error", "Triton Error [CUDA]", "TensorRT")
"""Parts of errors of the device's libraries, which torch raises as RuntimeError."""


def cuda_failure_kind(error: Exception) -> FailureKind:
    """Return the kind of an error raised while work was queued on a CUDA device, or waited for.

    After an error of kind DEVICE, the CUDA context can no longer be used. Any other error was raised by Python before
    the work reached the device.
    """
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or any(part in text for part in OUT_OF_MEMORY_TEXTS):
        return FailureKind.OUT_OF_MEMORY
    if isinstance(error, torch.AcceleratorError):
        lacks_memory = getattr(error, "error_code", None) == OUT_OF_MEMORY_CODE
        return FailureKind.OUT_OF_MEMORY if lacks_memory else FailureKind.DEVICE
    if isinstance(error, RuntimeError) and any(part in text for part in DEVICE_TEXTS):
        return FailureKind.DEVICE
    return synchronous_failure_kind(error)
