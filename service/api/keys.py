"""API keys: a JSON file of names, hashes and limits. A key itself is printed once, and kept nowhere."""

from __future__ import annotations

import hmac
import logging
import os
import secrets
import uuid
from collections.abc import Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from service.errors import KeysError

PREFIX = "iddpm_"
"""So that people, and programs that look for leaked secrets, know what they see."""

log = logging.getLogger(__name__)


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
        return _KeysFile.model_validate_json(path.read_bytes()).keys
    except OSError as error:
        raise KeysError(f"{path}: {error.strerror}") from error
    except ValidationError as error:
        raise KeysError(f"{path}: {_described(error)}") from None  # which quotes the file


def write_keys(path: Path, keys: Sequence[ApiKey]) -> None:
    """Write a keys file; a service that reads it meanwhile sees the old one or the new one.

    Raises:
        KeysError: it cannot be written.
    """
    text = _KeysFile(keys=tuple(keys)).model_dump_json(indent=2, exclude_none=True) + "\n"
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with temporary.open("x") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):  # where there is no folder, there is no file to be removed either
            temporary.unlink(missing_ok=True)
        raise KeysError(f"{path}: {error.strerror}") from error


def _described(error: ValidationError) -> str:
    """Say what is wrong, and where, in no words of the file's own: what stands in the wrong place may be a key."""
    told = []
    for problem in error.errors(include_url=False, include_input=False):
        where = problem["loc"][:-1] if problem["type"] == "extra_forbidden" else problem["loc"]
        message = "has an unknown field" if problem["type"] == "extra_forbidden" else problem["msg"]
        told.append(": ".join(filter(None, [".".join(map(str, where)), message.removeprefix("Value error, ")])))
    return "; ".join(told)


class KeyRing:
    """The keys in force: those of a file as it is now; while it is damaged or gone, those that were last read."""

    def __init__(self, path: Path) -> None:
        """Read the file.

        Raises:
            KeysError: see `read_keys`.
        """
        self._path = path
        self._seen = self._state_of_file()
        self._keys = read_keys(path)

    def find(self, key: str) -> ApiKey | None:
        """Return what is known of a key; the time it takes does not tell how much of it was right."""
        self._refresh()
        presented, found = hash_of(key), None
        for known in self._keys:
            if hmac.compare_digest(presented, known.sha256):
                found = known
        return found

    def _refresh(self) -> None:
        now = self._state_of_file()
        if now == self._seen:
            return
        self._seen = now
        try:
            self._keys = read_keys(self._path)
        except KeysError as error:
            log.error("keys: %s; those read before stay in force", error)
        else:
            log.info("keys: read again, %d in force", len(self._keys))

    def _state_of_file(self) -> tuple[int, int, int] | None:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_ino, found.st_size
