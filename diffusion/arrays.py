"""The two kinds of array that the core computes on, numpy's and torch's, through the Python array API standard.

One implementation serves both, and torch is imported by those only who bring tensors. Where the standard would make
a CUDA device wait (`clip` of array-api-compat indexes tensors by a mask), minimum and maximum are used instead.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

import array_api_compat
import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Tensor

A = TypeVar("A", npt.NDArray[Any], "Tensor")
"""Either kind, the same throughout a signature."""


_NAMESPACES: dict[type, Any] = {}
"""By kind: to find out takes longer than many an operation of a step."""


def namespace(x: A) -> Any:
    """Return the functions of the array API standard for an array's kind: `xp.where`, `xp.exp`, `xp.float32`, ..."""
    kind = type(x)
    if kind not in _NAMESPACES:
        _NAMESPACES[kind] = array_api_compat.array_namespace(x)
    return _NAMESPACES[kind]


def on_host(x: A) -> bool:
    """Say whether an array's numbers can be read without waiting for a device."""
    return str(x.device).startswith("cpu")


def to_numpy(x: A) -> npt.NDArray[Any]:
    """Return an array's numbers on the host; without a copy where they are there already."""
    return x if isinstance(x, np.ndarray) else x.detach().cpu().numpy()


def no_gradients(x: A) -> AbstractContextManager[None]:
    """Open a context in which nothing is recorded for differentiation; with numpy nothing ever is."""
    return nullcontext() if isinstance(x, np.ndarray) else namespace(x).no_grad()
