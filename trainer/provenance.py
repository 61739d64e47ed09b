"""Version of this repository, recorded in checkpoints and results."""

from __future__ import annotations

import subprocess
from pathlib import Path


def git_commit() -> str | None:
    """Return the commit of this tree, with the suffix `-dirty` if the tree differs; None outside a git checkout."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],  # noqa: S607  # whichever git the user has
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
