"""What an operator may set."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from service.settings import Settings

MODELS = (Path("m"),)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_needs_no_keys(host: str) -> None:
    assert Settings(models=MODELS, host=host).keys_file is None


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "images.example", ""])  # noqa: S104  # refused
def test_listening_for_others_needs_keys_or_the_word_that_none_are_wanted(host: str) -> None:
    with pytest.raises(ValidationError, match="can be reached by others, who would need no key"):
        Settings(models=MODELS, host=host)
    assert Settings(models=MODELS, host=host, keys_file=Path("keys.json")).host == host
    assert Settings(models=MODELS, host=host, allow_keyless=True).host == host
