"""Both kinds of array, for tests that run with numpy arrays and with tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion.arrays import to_numpy

Kind = Literal["numpy", "torch"]
KINDS = pytest.mark.parametrize("kind", ["numpy", "torch"])
XP: dict[Kind, Any] = {"numpy": np, "torch": torch}


def of_kind(kind: Kind, values: Any) -> Any:
    """Return a copy of values as an array of a kind."""
    copy = np.array(to_numpy(values))
    return copy if kind == "numpy" else torch.from_numpy(copy)


def on_kind(kind: Kind, network: Callable[..., Tensor]) -> Callable[..., Any]:
    """Return a function of tensors as a function of arrays of a kind."""

    def run(*arguments: Any) -> Any:
        return of_kind(kind, network(*(None if a is None else of_kind("torch", a) for a in arguments)))

    return run
