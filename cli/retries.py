"""Decide whether a request is sent again, and when: only if that is safe, and within a time limit."""

from __future__ import annotations

import logging
import random
import ssl

import httpx

REFUSED = frozenset({429, 503})
"""Statuses with which the service refuses a request before any work."""
LOST_BEHIND_PROXY = 502
"""Status of a proxy that lost its connection to the service."""
LOST_BEHIND_RAY = 500
"""Status of Ray Serve's proxies for the same, as plain text; the service describes its own errors in JSON."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 8.0

Outcome = httpx.Response | httpx.TransportError

log = logging.getLogger(__name__)


class Retries:
    """The retries of one request.

    If the connection could not be made, or the status is 429 or 503, no work was done and a retry is always safe.
    After a TLS error a retry would be safe, but it would fail again. If the connection broke, work may have been done,
    and a retry is safe only if the request is repeatable.
    """

    def __init__(self, patience_s: float, *, repeatable: bool) -> None:
        """Create the state of a request that was not sent yet.

        Args:
            patience_s: most seconds of pauses in total; a longer Retry-After ends the retries immediately.
            repeatable: whether a repetition has the same result, and the service does the work once.
        """
        self._left_s = patience_s
        self._repeatable = repeatable
        self._pause_s = FIRST_PAUSE_S

    def pause_after(self, outcome: Outcome) -> float | None:
        """Return the seconds to wait before the next attempt; None if the outcome is final."""
        if not self._may_repeat(outcome):
            return None
        # Not before Retry-After, plus a random pause, because other clients got the same Retry-After
        pause_s = _retry_after_s(outcome) + self._pause_s * random.uniform(0.5, 1.0)  # noqa: S311  # no secret
        if pause_s > self._left_s:
            return None
        what = (
            f"answered {outcome.status_code}"
            if isinstance(outcome, httpx.Response)
            else str(outcome) or type(outcome).__name__
        )
        log.info("%s; retrying in %.1f s", what, pause_s)
        self._left_s -= pause_s
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
        return pause_s

    def _may_repeat(self, outcome: Outcome) -> bool:
        if isinstance(outcome, httpx.Response):
            return outcome.status_code in REFUSED or (self._repeatable and _lost_by_proxy(outcome))
        if tls_error_of(outcome) is not None:
            return False
        if isinstance(outcome, (httpx.ConnectError, httpx.ConnectTimeout)):
            return True
        return self._repeatable and isinstance(outcome, (httpx.NetworkError, httpx.RemoteProtocolError))


def _lost_by_proxy(response: httpx.Response) -> bool:
    is_text = response.headers.get("content-type", "").startswith("text/plain")
    return response.status_code == LOST_BEHIND_PROXY or (response.status_code == LOST_BEHIND_RAY and is_text)


def tls_error_of(error: BaseException) -> ssl.SSLError | None:
    """Return the TLS error that caused an error, such as an untrusted certificate, for which a retry is useless.

    Returns:
        The TLS error; None if there is none, or if the connection only broke during the handshake.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLError):
            return None if isinstance(cause, (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError)) else cause
        cause = cause.__cause__ or cause.__context__
    return None


def _retry_after_s(outcome: Outcome) -> float:
    """Return the seconds of a response's Retry-After; 0 if absent, or a date, which this service does not send."""
    given = outcome.headers.get("retry-after", "") if isinstance(outcome, httpx.Response) else ""
    return float(given) if given.isascii() and given.isdecimal() else 0.0
