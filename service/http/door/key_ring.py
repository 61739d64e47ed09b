"""Hold the API keys in force; every request checks the keys file for changes."""

from __future__ import annotations

import hmac
import logging
import math
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from service.errors import KeysError
from service.http.door.keys import ApiKey, hash_of, read_keys

RETRY_S = 1.0
"""Interval for retrying an unreadable file that has not changed."""
REMIND_S = 60.0
"""Interval at which the log repeats that the file cannot be read."""

log = logging.getLogger(__name__)


class KeyRing:
    """The keys in force: those in the current file or, while it is damaged or missing, those read last."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        """Read the file.

        Raises:
            KeysError: see `read_keys`.
        """
        self._path = path
        self._clock = clock
        self._seen = self._state_of_file()
        self._keys = read_keys(path)
        self._read_at = datetime.now(UTC)
        self._read_again_at = math.inf
        self._trouble = ""
        self._remind_at = math.inf
        self._warn_if_empty()

    def find(self, key: str) -> ApiKey | None:
        """Return the record of a key, in a time that does not depend on how much of the key is correct."""
        self._refresh()
        presented, found = hash_of(key), None
        for known in self._keys:
            if hmac.compare_digest(presented, known.sha256):
                found = known
        return found

    def _refresh(self) -> None:
        state, now = self._state_of_file(), self._clock()
        if state == self._seen and now < self._read_again_at:
            return
        self._seen = state
        try:
            self._keys = read_keys(self._path)
        except KeysError as error:
            self._read_again_at = now + RETRY_S
            self._report(str(error), now)
            return
        self._read_at = datetime.now(UTC)
        self._read_again_at, self._trouble = math.inf, ""
        log.info("keys: read again, %d in force", len(self._keys))
        self._warn_if_empty()

    def _report(self, trouble: str, now: float) -> None:
        if trouble == self._trouble and now < self._remind_at:
            return
        self._trouble, self._remind_at = trouble, now + REMIND_S
        log.error(
            "keys: %s. Until it can be read, the keys read at %s stay in force (%d); adding or removing has no effect",
            trouble,
            self._read_at.isoformat(timespec="seconds"),
            len(self._keys),
        )

    def _warn_if_empty(self) -> None:
        if not self._keys:
            log.warning(
                "keys: %s holds no key: requests get 401 until iddpm keys add NAME --file %s", self._path, self._path
            )

    def _state_of_file(self) -> tuple[int, ...] | None:
        try:
            found = self._path.stat()
        except OSError:
            return None
        # ctime too: a change of mode or owner may make the file readable again
        return found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_size
