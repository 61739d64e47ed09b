"""The number of examples of a test: the full count with IDDPM_TEST_LONG=1, a tenth or less otherwise."""

from __future__ import annotations

import os

LONG = os.environ.get("IDDPM_TEST_LONG") == "1"


def count(full: int, share: int = 10) -> int:
    """Return the number of examples to run for a full count: all, or one in `share`."""
    return full if LONG else max(1, full // share)
