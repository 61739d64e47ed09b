"""How to install what is missing: from the sources of iddpm, since an index may have another package of its name."""

from __future__ import annotations


def install_command(extra: str | None) -> str:
    """Return the command that installs an extra; None: what every install has."""
    return f"pip install -c constraints.txt -e '.{'' if extra is None else f'[{extra}]'}' (in a checkout of iddpm)"
