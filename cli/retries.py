"""Whether a request is sent again, and when: only where that is safe, and only for so long."""

from __future__ import annotations

import logging
import random
import ssl

import httpx

REFUSED = frozenset({429, 503})
"""The service refuses with these before any work."""
LOST_BEHIND_PROXY = 502
"""A proxy lost the service while it waited for its answer."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 8.0

Outcome = httpx.Response | httpx.TransportError

log = logging.getLogger(__name__)


class Retries:
    """Decides about one request, after each time that it was sent.

    A connection that could not be made, 429 and 503 mean that nothing was done: sending again is always safe. So it is
    where encryption was refused, but would come to the same. A connection that broke may have cost work: it is safe
    where the request is repeatable only.
    """

    def __init__(self, patience_s: float, *, repeatable: bool) -> None:
        """Begin with a request that was not sent yet.

        Args:
            patience_s: longest time spent on pauses, in all; a Retry-After beyond it ends the trying at once.
            repeatable: whether sending it again gives what the first time gave, or would have given.
        """
        self._left_s = patience_s
        self._repeatable = repeatable
        self._pause_s = FIRST_PAUSE_S

    def pause_after(self, outcome: Outcome) -> float | None:
        """Return the seconds to wait before the request is sent again; None: what came is final."""
        if not self._may_repeat(outcome):
            return None
        # Never earlier than was asked for; and spread, because others were told the same
        pause_s = _retry_after_s(outcome) + self._pause_s * random.uniform(0.5, 1.0)  # noqa: S311  # no secret
        if pause_s > self._left_s:
            return None
        what = (
            f"answered {outcome.status_code}"
            if isinstance(outcome, httpx.Response)
            else str(outcome) or type(outcome).__name__
        )
        log.info("%s; trying again in %.1f s", what, pause_s)
        self._left_s -= pause_s
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
        return pause_s

    def _may_repeat(self, outcome: Outcome) -> bool:
        if isinstance(outcome, httpx.Response):
            return outcome.status_code in REFUSED or (self._repeatable and outcome.status_code == LOST_BEHIND_PROXY)
        if tls_error_of(outcome) is not None:
            return False
        if isinstance(outcome, (httpx.ConnectError, httpx.ConnectTimeout)):
            return True
        return self._repeatable and isinstance(outcome, (httpx.NetworkError, httpx.RemoteProtocolError))


def tls_error_of(error: BaseException) -> ssl.SSLError | None:
    """Return why an encrypted connection was refused: a certificate, say, which the next try would find again.

    A connection that only broke off while it was being encrypted is no such error.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLError):
            return None if isinstance(cause, (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError)) else cause
        cause = cause.__cause__ or cause.__context__
    return None


def _retry_after_s(outcome: Outcome) -> float:
    """Return what the answer asks for; 0 if it asks for nothing, or by a date, which this service does not."""
    given = outcome.headers.get("retry-after", "") if isinstance(outcome, httpx.Response) else ""
    return float(given) if given.isascii() and given.isdecimal() else 0.0
