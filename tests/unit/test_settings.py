"""What an operator may set."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from service.settings import Settings, refuse_unknown_variables

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


def test_models_can_be_changed_by_others_only_with_keys() -> None:
    root = Path("models")
    assert Settings(models=MODELS, admin_root=root).admin_root == root
    assert Settings(models=MODELS, admin_root=root, host="192.0.2.1", keys_file=Path("keys.json")).admin_root == root
    with pytest.raises(ValidationError, match="could load and unload models"):
        Settings(models=MODELS, admin_root=root, host="192.0.2.1", allow_keyless=True)


def test_misspelt_variables_are_refused_and_those_of_the_client_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IDDPM_KEY", "iddpm_x")
    refuse_unknown_variables()
    monkeypatch.setenv("IDDPM_KEYS", "iddpm_x")
    with pytest.raises(ValueError, match=r"unknown environment variable IDDPM_KEYS; settings are .*IDDPM_KEYS_FILE"):
        refuse_unknown_variables()
