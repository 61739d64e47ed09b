"""Install commands for error messages: from the sources, because an index may have another package called iddpm."""

from __future__ import annotations


def install_command(extra: str | None) -> str:
    """Return the command that installs an extra; None: the base install."""
    return f"pip install -c constraints.txt -e '.{'' if extra is None else f'[{extra}]'}' (in a checkout of iddpm)"
