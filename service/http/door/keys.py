"""API keys: a JSON file of names, hashes and limits. A key itself is printed once, and kept nowhere."""

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
"""So that people, and programs that look for leaked secrets, know what they see."""


class Limits(BaseModel):
    """What the holder of a key may do; None: whatever the service allows."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    images_in_flight: Annotated[int, Field(ge=0)] | None = None
    """Images accepted and not yet done; 0: may look (models, metrics), not generate."""
    requests_per_minute: Annotated[int, Field(ge=1)] | None = None
    """POST requests, whatever becomes of them; so many may come at once."""
    row_steps_per_request: Annotated[int, Field(ge=1)] | None = None
    """Images x steps of one request, twice that with classifier-free guidance."""


class ApiKey(BaseModel):
    """What is kept of a key."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    """Whose it is; stands in the log."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Of 256 random bits, which nobody can guess: no slow hash is needed, and the file is no secret."""
    limits: Limits = Limits()
    admin: bool = False
    """Whether it may load and unload models."""


class _KeysFile(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    keys: tuple[ApiKey, ...]

    @model_validator(mode="after")
    def _distinct(self) -> _KeysFile:
        names = [key.name for key in self.keys]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"names must differ; twice here: {', '.join(twice)}")
        return self


def new_key() -> str:
    """Draw a key."""
    return PREFIX + secrets.token_urlsafe(32)


def hash_of(key: str) -> str:
    """Return what a keys file holds of a key."""
    return sha256(key.encode()).hexdigest()


def read_keys(path: Path) -> tuple[ApiKey, ...]:
    """Read a keys file.

    Raises:
        KeysError: it cannot be read, or is no keys file; says what is wrong with it.
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
        raise KeysError(f"{path}: {_described(error)}") from None  # which quotes the file


def require_keys(path: Path) -> None:
    """Check that a keys file can be read, before a service starts.

    Raises:
        KeysError: see `read_keys`; where there are no keys yet, says how to make one.
    """
    try:
        read_keys(path)
    except KeysError as error:
        if is_absent_or_empty(path):  # while a service runs, that would replace the keys which it still knows
            raise KeysError(f"{error}; iddpm keys add NAME --file {path} puts a key into it") from error
        raise


def is_absent_or_empty(path: Path) -> bool:
    """Return whether there are no keys yet; an empty file may have been made for its owner and mode."""
    try:
        return not path.read_bytes().strip()
    except FileNotFoundError:
        return True
    except OSError:
        return False  # reading it says why


def keys_text(keys: Sequence[ApiKey]) -> str:
    """Return what a keys file holds."""
    return _KeysFile(keys=tuple(keys)).model_dump_json(indent=2, exclude_none=True) + "\n"


def _described(error: ValidationError) -> str:
    """Say what is wrong, and where, in no words of the file's own: what stands in the wrong place may be a key."""
    told = []
    for problem in error.errors(include_url=False, include_input=False):
        where = problem["loc"][:-1] if problem["type"] == "extra_forbidden" else problem["loc"]
        message = "has an unknown field" if problem["type"] == "extra_forbidden" else problem["msg"]
        told.append(": ".join(filter(None, [".".join(map(str, where)), message.removeprefix("Value error, ")])))
    return "; ".join(told)
