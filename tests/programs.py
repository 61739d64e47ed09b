"""Programs that some tests need and pip does not install; `.ci/run` installs them."""

from __future__ import annotations

import os
import shutil

import pytest


def tool(name: str) -> str:
    """Return a program's path. Without it, skip the test, or fail where every test must run (.ci/run)."""
    if path := shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin"):  # not in every user's PATH
        return path
    message = f"{name} is not installed"
    if os.environ.get("IDDPM_REQUIRE_ALL"):
        pytest.fail(message)
    pytest.skip(message)
