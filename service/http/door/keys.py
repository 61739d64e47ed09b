"""API keys: a JSON file of names, hashes and limits. The key itself is printed once and stored nowhere."""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from service.errors import KeysError

PREFIX = "iddpm_"
"""Prefix of all keys, by which people and secret scanners recognise a leaked key."""


class Limits(BaseModel):
    """Limits of a key; None: only the limits of the service apply."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    images_in_flight: Annotated[int, Field(ge=0)] | None = None
    """Maximum number of accepted images that are not done; 0: read access only (models, metrics)."""
    requests_per_minute: Annotated[int, Field(ge=1)] | None = None
    """Maximum rate of POST requests, failed ones included; a burst may use a whole minute's requests at once."""
    row_steps_per_request: Annotated[int, Field(ge=1)] | None = None
    """Maximum of images x steps of one request, doubled with classifier-free guidance."""


class ApiKey(BaseModel):
    """The stored record of a key."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    """Name of the holder, as logged."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Hash of the key. A key has 256 random bits, so a fast hash is safe and the file is not a secret."""
    limits: Limits = Limits()
    admin: bool = False
    """Whether the key may load and unload models."""


class _KeysFile(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    keys: tuple[ApiKey, ...]

    @model_validator(mode="after")
    def _distinct(self) -> _KeysFile:
        names = [key.name for key in self.keys]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"names must differ; duplicates: {', '.join(twice)}")
        return self


def new_key() -> str:
    """Return a new random key."""
    return PREFIX + secrets.token_urlsafe(32)


def hash_of(key: str) -> str:
    """Return the hash of a key, as a keys file stores it."""
    return sha256(key.encode()).hexdigest()


def read_keys(path: Path) -> tuple[ApiKey, ...]:
    """Read a keys file.

    Raises:
        KeysError: the file cannot be read or is not a valid keys file; the message gives the reason.
    """
    try:
        content = path.read_bytes()
    except PermissionError as error:
        raise KeysError(f"{path}: {error.strerror}; user {os.geteuid()} must be able to read it") from error
    except OSError as error:
        raise KeysError(f"{path}: {error.strerror}") from error
    if not content.strip():
        raise KeysError(f"{path} is empty")
    try:
        return _KeysFile.model_validate_json(content).keys
    except ValidationError as error:
        raise KeysError(f"{path}: {_described(error)}") from None  # the chained error would quote the file


def require_keys(path: Path) -> None:
    """Check that a keys file can be read, before a service starts.

    Raises:
        KeysError: see `read_keys`; if there are no keys yet, the message gives the command that creates one.
    """
    try:
        read_keys(path)
    except KeysError as error:
        if is_absent_or_empty(
            path
        ):  # not in read_keys: while a service runs, adding a key would replace those in force
            raise KeysError(f"{error}; to add a key: iddpm keys add NAME --file {path}") from error
        raise


def is_absent_or_empty(path: Path) -> bool:
    """Return whether there are no keys yet. An empty file may have been created to set owner and mode."""
    try:
        return not path.read_bytes().strip()
    except FileNotFoundError:
        return True
    except OSError:
        return False  # reading the file reports the reason


def keys_text(keys: Sequence[ApiKey]) -> str:
    """Return the content of a keys file."""
    return _KeysFile(keys=tuple(keys)).model_dump_json(indent=2, exclude_none=True) + "\n"


def _described(error: ValidationError) -> str:
    """Describe the errors and their locations without quoting values: a misplaced value may be a key."""
    descriptions = []
    for problem in error.errors(include_url=False, include_input=False):
        where = problem["loc"][:-1] if problem["type"] == "extra_forbidden" else problem["loc"]
        message = "has an unknown field" if problem["type"] == "extra_forbidden" else problem["msg"]
        descriptions.append(": ".join(filter(None, [".".join(map(str, where)), message.removeprefix("Value error, ")])))
    return "; ".join(descriptions)
