"""numpy arrays and torch tensors through the Python array API standard.

One implementation serves both, and this module does not import torch. numpy implements the standard itself; what
array-api-compat wraps around it imports 180 modules more. Use minimum and maximum instead of `clip`: that of
array-api-compat indexes tensors by a mask, which makes a CUDA device wait.
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
"""A numpy array or a torch tensor, the same throughout a signature."""


_NAMESPACES: dict[type, Any] = {}
"""Cache by array type: the lookup takes longer than many operations of a sampling step."""


def namespace(x: A) -> Any:
    """Return the array API namespace of an array: `xp.where`, `xp.exp`, `xp.float32`, ..."""
    kind = type(x)
    if kind not in _NAMESPACES:
        _NAMESPACES[kind] = np if isinstance(x, (np.ndarray, np.generic)) else array_api_compat.array_namespace(x)
    return _NAMESPACES[kind]


def on_host(x: A) -> bool:
    """Return whether an array's values can be read without waiting for a device."""
    return str(x.device).startswith("cpu")


def to_numpy(x: A) -> npt.NDArray[Any]:
    """Return an array as numpy, without a copy if it is in host memory already."""
    return x if isinstance(x, np.ndarray) else x.detach().cpu().numpy()


def no_gradients(x: A) -> AbstractContextManager[None]:
    """Return a context in which torch records no gradients; it does nothing for numpy."""
    return nullcontext() if isinstance(x, np.ndarray) else namespace(x).no_grad()
