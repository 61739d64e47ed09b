"""JSON files that hold an object, such as `config.json` and `manifest.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from formats.file_content import describe_wrong_content


def read_object(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file.

    Raises:
        OSError: the file does not exist or cannot be read.
        ValueError: the file is not valid JSON, or does not hold an object; the message names the file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        if problem := describe_wrong_content(path, may_be_text=True):
            raise ValueError(f"{path} {problem}") from error
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object; got {type(content).__name__}")
    return content
