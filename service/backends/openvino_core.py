"""The single `openvino.Core` of this process."""

from __future__ import annotations

from functools import cache

import openvino


@cache
def openvino_core() -> openvino.Core:
    """Return the process's core, which is never destroyed.

    The CPU plugin of each core replaces the alternate signal stack of its thread, and frees its own when the core is
    destroyed. With two cores whose lifetimes overlap, or one that is destroyed in another thread, the thread is left
    with a freed stack, and the next signal that it handles (SIGTERM, for Python) ends the process with SIGSEGV.
    """
    return openvino.Core()
