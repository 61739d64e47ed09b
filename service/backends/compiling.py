"""Compile functions of tensors with torch.compile: as one graph, once per shape, or raise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch._dynamo.config as dynamo_config
import torch._inductor

REPEATABLE = ("deterministic", "batch_invariant")
"""Options of Inductor (the second exists since torch 2.13): without them, it chooses how to divide a sum by timing, and
by the batch size."""


def compile_per_shape(
    function: Callable[..., Any], variants: int, options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """Compile a function that is called with few different shapes; it never runs uncompiled.

    Args:
        function: a function of tensors.
        variants: how often it may be compiled; one more is an error.
        options: of the compiler (Inductor).
    """
    # The limit is one of the process: torch.compile(recompile_limit=...) needs torch 2.13
    dynamo_config.recompile_limit = max(dynamo_config.recompile_limit, variants)
    return torch.compile(function, fullgraph=True, dynamic=False, options=None if options is None else dict(options))


def repeatable_options() -> dict[str, bool]:
    """Return the options, of those that this torch has, that make results independent of timing and batch size."""
    known = set(torch._inductor.list_options())  # noqa: SLF001  # a public function of this module
    return {name: True for name in REPEATABLE if name in known}
